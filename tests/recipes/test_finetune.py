"""Fine-tuning from the command line, on small data, from a small checkpoint."""

import json
import shutil

import pytest
import torch

from rlm_mhc import fn, load_pretrained, save_pretrained
from rlm_mhc.data import Source, load_tokenizer, train_tokenizer
from rlm_mhc.program import make_program
from rlm_mhc.testing import small_config
from rlm_mhc.testing.models import perturbed
from rlm_mhc.testing.runs import SMALL_TRAINING, read_metrics
from rlm_mhc.train.evaluate import evaluate
from rlm_mhc.train.finetune_config import FinetuneConfig
from rlm_mhc.train.output import read_config
from rlm_mhc.tree import tree_map

CHAT = [{"role": "user", "content": "stream or matrix?"}, {"role": "assistant", "content": "a row"}]
RECORDS = {
    "text": [{"text": f"stream matrix row column {i} gain token layer head"} for i in range(30)],
    "completion": [{"prompt": f"stream {i}:", "completion": "row"} for i in range(30)],
    "chat": [{"messages": [*CHAT, {"role": "user", "content": str(i)}]} for i in range(30)],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint with a tokenizer, away from the symmetric start."""
    folder = tmp_path_factory.mktemp("base")
    config = small_config(vocab_size=300, mhc_sinkhorn_iters=5)
    save_pretrained(folder, perturbed(fn.init(config), 0.02), config)
    texts = [" ".join(str(record.values()) for record in RECORDS["text"])]
    train_tokenizer(Source("words", "w", lambda bad: iter(texts)), 290).save_pretrained(folder)
    return folder


@pytest.fixture
def finetune(recipe, monkeypatch):
    # Half of the time of a run this small: the device's rate is measured, and pictures are drawn.
    monkeypatch.setattr("rlm_mhc.train.plan.peak_rate", lambda *_: (1e9, "assumed"))
    monkeypatch.setattr("rlm_mhc.train.loop.draw_curves", lambda records, file, title: file.touch())
    return lambda *arguments: recipe("finetune", *SMALL_TRAINING, *arguments)


@pytest.fixture
def data(tmp_path):
    def write(kind):
        file = tmp_path / f"{kind}.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS[kind]))
        return f"data.train_path={file}"

    return write


@pytest.mark.parametrize("kind", RECORDS)
def test_every_format_starts_from_the_checkpoint_and_learns(finetune, base, data, tmp_path, kind):
    out = tmp_path / "run"
    arguments = [f"checkpoint={base}", f"output_dir={out}", data(kind), "data.max_length=64", "training.max_steps=5"]
    template = ["data.chat_template=chatml"] if kind == "chat" else []
    result = finetune(*arguments, *template)
    assert result.code == 0, result.err
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == list(range(6))
    assert rows[0].keys() == {"step", "tokens", "eval/loss"}
    assert rows[-1]["eval/loss"] < rows[0]["eval/loss"] - 0.1
    assert f"eval loss    {rows[0]['eval/loss']:.3f} at the start, {rows[-1]['eval/loss']:.3f} now" in result.out
    assert "sample text" in result.out
    newest = out / "checkpoints" / "checkpoint-5"
    assert f"newest checkpoint: {newest}" in result.out
    assert load_pretrained(newest)[1] == load_pretrained(base)[1]
    assert (newest / "tokenizer.json").is_file()
    assert (newest / "chat_template.jinja").is_file() == (kind == "chat")
    assert (out / "curves.png").is_file()


def test_generation_of_what_is_fine_tuned_ends_where_the_source_and_its_turns_end(finetune, base, data, tmp_path):
    source, out = tmp_path / "source", tmp_path / "run"
    shutil.copytree(base, source)
    tokenizer = load_tokenizer(str(source), 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    )
    tokenizer.save_pretrained(source)
    said = {"_from_model_config": True, "eos_token_id": 7, "temperature": 0.6, "do_sample": True}
    (source / "generation_config.json").write_text(json.dumps(said))
    arguments = [
        f"checkpoint={source}",
        f"output_dir={out}",
        data("chat"),
        "data.max_length=64",
        "training.max_steps=1",
    ]
    result = finetune(*arguments)
    assert result.code == 0, result.err
    written = json.loads((out / "checkpoints" / "checkpoint-1" / "generation_config.json").read_text())
    ends = [7, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert written == {"pad_token_id": 0, "eos_token_id": ends, "temperature": 0.6, "do_sample": True}


def test_step_zero_is_the_loss_of_the_checkpoint_itself(finetune, base, data, tmp_path):
    out = tmp_path / "run"
    arguments = [f"checkpoint={base}", f"output_dir={out}", data("text"), "training.max_steps=1"]
    assert finetune(*arguments).code == 0
    params, _ = load_pretrained(base)
    run = read_config(out / "config.yaml")
    assert isinstance(run, FinetuneConfig)
    prepared = run.data.reader()(run.token_folder, run.tokenizer, run.model.vocab_size)
    loss_sum = make_program(run.model, run.training).loss_sum
    assert read_metrics(out)[0]["eval/loss"] == evaluate(loss_sum, params, run, prepared)


def test_without_data_it_takes_the_built_in_corpus(finetune, base, tmp_path, monkeypatch):
    few = Source("few", "few", lambda bad: iter(record["text"] for record in RECORDS["text"]))
    monkeypatch.setattr("rlm_mhc.train.run_config.builtin_source", lambda: few)
    result = finetune(f"checkpoint={base}", f"output_dir={tmp_path / 'run'}", "training.max_steps=1")
    assert result.code == 0, result.err
    assert "data         few" in result.out


@pytest.mark.parametrize("kind", ["run", "sharded", "bf16"])
def test_any_checkpoint_will_do(finetune, pretrain, base, corpus, data, tmp_path, kind):
    folder, tokenizer = tmp_path / "other", []
    if kind == "run":
        arguments = [f"data.train_path={corpus}", f"output_dir={tmp_path / 'pretrained'}", "training.max_steps=1"]
        assert pretrain(*arguments).code == 0
        folder = tmp_path / "pretrained" / "checkpoints" / "checkpoint-1"
    elif kind == "sharded":
        from rlm_mhc.model import RLMModel

        RLMModel.from_pretrained(base).save_pretrained(folder, max_shard_size="40KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
        tokenizer = [f"data.tokenizer={base}"]
    else:
        params, config = load_pretrained(base)
        save_pretrained(folder, tree_map(lambda leaf: leaf.bfloat16(), params), config)
        tokenizer = [f"data.tokenizer={base}"]
    out = tmp_path / "run"
    given = [f"checkpoint={folder}", f"output_dir={out}", data("completion"), *tokenizer, "training.max_steps=2"]
    result = finetune(*given)
    assert result.code == 0, result.err
    params, _ = load_pretrained(out / "checkpoints" / "checkpoint-2")
    assert params.norm.weight.dtype == torch.float32


def stopped(finetune, arguments, out, step):
    """A run to its end, and the folder as it was when only the checkpoint of that step had been written."""
    assert finetune(*arguments, f"output_dir={out}").code == 0
    whole = read_metrics(out)
    for path in (out / "checkpoints").iterdir():
        if path.name != f"checkpoint-{step}":
            shutil.move(path, out.parent / f"{out.name}-{path.name}")
    return whole


def without_speed(rows):
    return [{k: v for k, v in row.items() if k not in ("tokens_per_sec", "mfu", "save_stall")} for row in rows]


def test_a_resumed_run_is_bit_for_bit_one_never_stopped(finetune, base, data, tmp_path):
    out = tmp_path / "run"
    arguments = [f"checkpoint={base}", data("completion"), "training.max_steps=5", "training.save_steps=2"]
    whole = stopped(finetune, arguments, out, 2)
    result = finetune(*arguments, f"output_dir={out}", "resume=auto")
    assert result.code == 0, result.err
    assert "step 2: weights, optimizer, schedule, random generators, place in the data" in result.out
    assert without_speed(read_metrics(out)) == without_speed(whole)
    again, before = out / "checkpoints" / "checkpoint-5", tmp_path / "run-checkpoint-5"
    for name in ("model.safetensors", "optimizer.pt", "generators.pt"):
        assert (again / name).read_bytes() == (before / name).read_bytes(), name


LORA = ["lora.rank=4", "lora.alpha=8", "training.optimizer.lr=2e-2"]


def test_adapters_learn_and_leave_a_model_as_any_other(finetune, base, data, tmp_path):
    peft = pytest.importorskip("peft")
    from rlm_mhc.model import RLMModel

    out = tmp_path / "run"
    arguments = [f"checkpoint={base}", f"output_dir={out}", data("completion"), *LORA, "training.max_steps=5"]
    result = finetune(*arguments)
    assert result.code == 0, result.err
    assert "parameters: adapters of rank 4 to q_proj, " in result.out
    rows = read_metrics(out)
    assert rows[-1]["eval/loss"] < rows[0]["eval/loss"] - 0.1
    newest = out / "checkpoints" / "checkpoint-5"
    tokens = torch.randint(300, (2, 16))
    merged = RLMModel.from_pretrained(newest).eval()
    adapted = peft.PeftModel.from_pretrained(RLMModel.from_pretrained(base), newest / "adapter").eval()
    with torch.no_grad():
        ours, theirs, before = (model(tokens).logits for model in (merged, adapted, RLMModel.from_pretrained(base)))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - before).abs().max() > 0.05
    site = adapted.base_model.model.model.layers[0].attn_mhc
    assert torch.equal(site.modules_to_save["default"].alpha, merged.model.layers[0].attn_mhc.alpha)
    start = RLMModel.from_pretrained(base).model
    assert not torch.equal(merged.model.layers[0].attn_mhc.alpha, start.layers[0].attn_mhc.alpha)
    assert torch.equal(merged.model.embed_tokens.weight, start.embed_tokens.weight)
    optimizer = torch.load(newest / "optimizer.pt", weights_only=True)
    assert "exp_avg.layers.0.self_attn.q_proj.lora_A" in optimizer
    # What it left is a checkpoint to start from, as any other.
    again = [f"checkpoint={newest}", f"output_dir={tmp_path / 'again'}", data("completion"), "training.max_steps=1"]
    assert finetune(*again).code == 0
    assert read_metrics(tmp_path / "again")[0]["eval/loss"] == pytest.approx(rows[-1]["eval/loss"], rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_of_adapters_is_bit_for_bit_one_never_stopped(finetune, base, data, tmp_path, precision):
    out = tmp_path / "run"
    arguments = [f"checkpoint={base}", data("completion"), *LORA, "training.max_steps=5", "training.save_steps=2"]
    arguments.append(f"training.mixed_precision={precision}")
    whole = stopped(finetune, arguments, out, 2)
    result = finetune(*arguments, f"output_dir={out}", "resume=auto")
    assert result.code == 0, result.err
    assert without_speed(read_metrics(out)) == without_speed(whole)
    again, before = out / "checkpoints" / "checkpoint-5", tmp_path / "run-checkpoint-5"
    for name in (
        "model.safetensors",
        "optimizer.pt",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
    ):
        assert (again / name).read_bytes() == (before / name).read_bytes(), name
    dtype = load_pretrained(again)[0].norm.weight.dtype
    assert dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def test_adapters_do_not_go_on_to_other_weights_or_of_another_kind(finetune, base, data, tmp_path):
    other, out = tmp_path / "other", tmp_path / "run"
    params, config = load_pretrained(base)
    save_pretrained(other, tree_map(lambda leaf: leaf + 1e-3, params), config)
    common = [f"output_dir={out}", data("completion"), f"data.tokenizer={base}", "training.max_steps=3"]
    assert finetune(*common, f"checkpoint={base}", *LORA).code == 0
    moved = shutil.copytree(base, tmp_path / "moved")
    same = [f"checkpoint={moved}", f"data.tokenizer={moved}", *LORA, "resume=auto"]
    assert "nothing left" in finetune(*common, *same).out
    for arguments, said in (
        ([f"checkpoint={other}", *LORA], "its adapters are to other weights"),
        ([f"checkpoint={base}", *LORA, "lora.rank=2"], "trained with lora.rank=4, and this run has 2"),
        ([f"checkpoint={base}"], "trained with lora.rank=4, and this run has 0"),
    ):
        refused = finetune(*common, *arguments, "resume=auto")
        assert refused.code == 2
        assert said in refused.last_error, refused.last_error
    newest = out / "checkpoints" / "checkpoint-3"
    file = newest / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    refused = finetune(*common, f"checkpoint={base}", *LORA, "resume=auto")
    assert "none of its 1 checkpoints is whole" in refused.last_error
    assert "adapter_model.safetensors: damaged" in refused.out


@pytest.mark.parametrize("lora", [[], LORA])
def test_a_diverging_run_leaves_a_step_to_replay(finetune, recipe, base, data, tmp_path, lora):
    wild = [*lora, "training.optimizer.lr=1e30", "training.scheduler.warmup_steps=0", "training.max_bad_steps=2"]
    arguments = [f"checkpoint={base}", f"output_dir={tmp_path / 'run'}", data("completion"), "training.max_steps=30"]
    result = finetune(*arguments, *wild)
    assert result.code == 2
    folder = next((tmp_path / "run" / "bad_steps").iterdir())
    replayed = recipe("replay", str(folder))
    assert replayed.code == 0, replayed.out + replayed.err
    assert "reproduced" in replayed.out


MISTAKES = {
    "checkpoint=null": ["checkpoint: name the folder"],
    "checkpoint=/nowhere": ["checkpoint=/nowhere", "no such folder"],
    "checkpiont=x": ["unknown key 'checkpiont'", "did you mean 'checkpoint'"],
    "+model.hidden_dim=3": ["model", "leave the key out"],
    "+resume_from_checkpoint=x": ["resume=auto"],
    "data.format=chat": ["no chat template", "data.chat_template=chatml"],
    "data.format=chat data.chat_template=chatml": ["no field 'messages'"],
    "data.format=chta": ["data.format='chta'", "did you mean 'chat'"],
    "data.format=chat data.train_path=null": ["data.format=chat", "data.train_path"],
    "data.chat_template=chatml": ["data.chat_template=chatml", "data.format=chat"],
    "data.train_path=/nowhere.jsonl": ["data.train_path=/nowhere.jsonl", "no such file"],
    "data.eval_path=/nowhere.jsonl": ["data.eval_path=/nowhere.jsonl", "no such file"],
    "lora.rank=-1": ["lora.rank=-1", "at least 0"],
    "lora.rank=4 lora.targets=[q_prj]": ["lora.targets", "did you mean 'q_proj'"],
    "lora.alpha=32": ["lora.alpha=32", "no effect with rank=0"],
    "data.max_length=65": ["data.max_length=65", "max_seq_len=64"],
}


@pytest.mark.parametrize("argument", MISTAKES)
def test_a_mistake_on_the_command_line(finetune, base, data, tmp_path, argument):
    common = [f"checkpoint={base}", data("completion"), f"output_dir={tmp_path / 'run'}", "training.max_steps=1"]
    result = finetune(*common, *argument.split())
    assert result.code == 2
    assert result.last_error.startswith("error: ")
    assert all(word in result.last_error for word in MISTAKES[argument]), result.last_error
    assert "Traceback" not in result.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_missing_or_too_large_tokenizer_is_named(finetune, base, data, tmp_path):
    params, config = load_pretrained(base)
    save_pretrained(tmp_path / "bare", params, config)
    common = [data("completion"), f"output_dir={tmp_path / 'run'}", "training.max_steps=1"]
    result = finetune(f"checkpoint={tmp_path / 'bare'}", *common)
    assert result.code == 2
    assert "it has no tokenizer; give that of the model by data.tokenizer=PATH" in result.last_error
    result = finetune(f"checkpoint={base}", data("chat"), *common[1:])
    assert "data.chat_template=chatml" in result.last_error
    large = train_tokenizer(Source("x", "x", lambda bad: iter(["abcdefgh" * 9, "hgfedcba" * 9])), 270)
    large.add_tokens([f"<{i}>" for i in range(60)])
    large.save_pretrained(tmp_path / "large")
    result = finetune(f"checkpoint={tmp_path / 'bare'}", *common, f"data.tokenizer={tmp_path / 'large'}")
    assert "more than model.vocab_size=300" in result.last_error


def test_a_folder_of_another_recipe_is_not_gone_on_with(finetune, pretrain, base, corpus, tmp_path):
    out = tmp_path / "run"
    assert pretrain(f"data.train_path={corpus}", f"output_dir={out}", "training.max_steps=1").code == 0
    checkpoint = out / "checkpoints" / "checkpoint-1"
    result = finetune(f"checkpoint={checkpoint}", f"data.train_path={corpus}", f"output_dir={out}", "resume=auto")
    assert result.code == 2
    assert "of a run of another recipe" in result.last_error
