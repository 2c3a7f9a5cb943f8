"""Programs that are not ours, each used as its own documentation has it."""

import copy
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

import rlm_mhc
from rlm_mhc import fn
from rlm_mhc.model import RLMBackbone, RLMForSequenceClassification, RLMModel
from rlm_mhc.testing import small_config

TASK = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def training_set(count=20):
    rows = torch.randint(300, (count, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in rows]


def test_auto_classes_and_a_pipeline(checkpoint):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    prompts = ["stream", "matrix row column"]
    generator = pipeline("text-generation", model=str(checkpoint))
    texts = [rows[0]["generated_text"] for rows in generator(prompts, batch_size=2, max_new_tokens=5, do_sample=False)]
    for prompt, text in zip(prompts, texts, strict=True):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=5, do_sample=False)
        assert text == tokenizer.decode(alone[0], skip_special_tokens=True)


def test_trainer_for_five_steps_and_again_from_its_checkpoint(checkpoint, tmp_path):
    def trained(steps, **options):
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        arguments = TrainingArguments(
            str(tmp_path / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            save_steps=3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=training_set(4))
        trainer.train(**options)
        return [row["loss"] for row in trainer.state.log_history if "loss" in row], model

    losses, model = trained(5)
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    params, _ = rlm_mhc.load_pretrained(tmp_path / "trainer" / "checkpoint-5")
    assert torch.equal(params.layers[1].mlp_mhc.phi, model.model.layers[1].mlp_mhc.phi)
    again, _ = trained(5, resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-3"))
    assert again[-2:] == losses[-2:]


def test_accelerate():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = RLMModel(small_config())
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    tokens, losses = torch.randint(61, (2, 9)), []
    for _ in range(4):
        loss = model(tokens, labels=tokens).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert isinstance(accelerator.unwrap_model(model), RLMModel)


@pytest.mark.parametrize("changes", [{}, {"mhc_enabled": False}, {"mhc_preset": "single_pass"}], ids=str)
def test_lora_adapters_on_all_linear_act(make_model, tokens, changes, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = make_model(**changes).double()
    before = model(tokens).logits.detach()
    options = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, options)
    adapters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * 7 * 2  # A and B of seven projections in two layers
    assert torch.equal(adapted(tokens).logits, before)  # B starts at zero
    torch.manual_seed(0)
    with torch.no_grad():
        for p in adapters.values():
            p.add_(0.1 * torch.randn_like(p))
    output = adapted(tokens, labels=tokens)
    assert (output.logits - before).abs().max() > 1e-2
    output.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapters.values())
    adapted.save_pretrained(tmp_path)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, output.logits)
    again = PeftModel.from_pretrained(make_model(**changes).double(), tmp_path)
    torch.testing.assert_close(again(tokens).logits, output.logits)


@pytest.mark.parametrize("kind", [RLMModel, RLMBackbone])
@pytest.mark.parametrize("renamed", [False, True])
def test_adapters_load_with_the_names_of_the_module_and_with_those_on_disk(make_model, tokens, tmp_path, kind, renamed):
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file, save_file

    make_model().save_pretrained(tmp_path / "base")
    sites = ["attn_mhc", "mlp_mhc"]
    options = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], modules_to_save=sites, init_lora_weights=False)
    adapted = get_peft_model(kind.from_pretrained(tmp_path / "base"), options)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "alpha" in name and parameter.requires_grad:
                parameter.add_(1)
    adapted.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    if renamed:
        named = load_file(file)
        save_file({name.replace("base_model.model.model.", "base_model.model."): w for name, w in named.items()}, file)
    again = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(again(tokens)[0], adapted(tokens)[0])
    inside = kind.from_pretrained(tmp_path / "base")
    inside.load_adapter(tmp_path / "adapter")
    assert torch.equal(inside(tokens)[0], adapted(tokens)[0])


def test_a_trained_head_of_a_tied_model_is_in_its_tree_and_on_disk(make_model, tokens, tmp_path):
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    adapted = get_peft_model(make_model(), options)
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    model = adapted.base_model.model
    assert torch.equal(fn.forward(model.tree(), tokens, small_config()), adapted(tokens).logits)
    merged = adapted.merge_and_unload()
    expected = merged(tokens).logits
    torch.testing.assert_close(expected, adapted(tokens).logits, rtol=1e-5, atol=1e-5)
    assert (expected - make_model()(tokens).logits).abs().max() > 0.1
    assert torch.equal(fn.forward(merged.tree(), tokens, small_config()), expected)
    merged.save_pretrained(tmp_path)
    params, config = rlm_mhc.load_pretrained(tmp_path)
    assert not config.tie_embeddings
    assert torch.equal(fn.forward(params, tokens, config), expected)
    assert torch.equal(RLMModel.from_pretrained(tmp_path)(tokens).logits, expected)


@pytest.mark.parametrize(
    ("options", "matched"),
    [
        (dict(target_modules=["q_proj"], layers_to_transform=[1]), {"layers.1.self_attn.q_proj"}),
        (dict(target_modules=r".*\.layers\..*\.up_proj"), {"layers.0.mlp.up_proj", "layers.1.mlp.up_proj"}),
        (
            dict(target_modules=r"model\.layers\.0\.mlp\.(up|down)_proj"),
            {"layers.0.mlp.up_proj", "layers.0.mlp.down_proj"},
        ),
        ({}, {f"layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qv"}),
    ],
    ids=["layers_to_transform", "a pattern", "a pattern with a prefix", "defaults"],
)
def test_targets_are_named_as_in_llama(make_model, options, matched):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(make_model(), LoraConfig(**options))
    ours = {name for name, module in adapted.base_model.model.model.named_modules() if hasattr(module, "lora_A")}
    assert ours == matched


@pytest.mark.parametrize("kind", ["IA3Config", "LNTuningConfig", "LoHaConfig"])
def test_other_adapters_have_default_targets(make_model, tokens, kind):
    import peft

    adapted = peft.get_peft_model(make_model(), getattr(peft, kind)())
    adapted(tokens, labels=tokens).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in adapted.parameters() if p.requires_grad)


def test_importing_the_models_imports_no_client():
    code = "import sys, rlm_mhc.model as m; m.RLMConfig().to_dict(); print({'peft', 'trl'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("changes", [{"mhc_preset": "deepseek_v4", "qkv_bias": True, "qk_norm": True}, {}], ids=str)
def test_trainer_decays_matrices_alone(make_model, changes, tmp_path):
    model = make_model(**changes)
    for subject in (model, copy.deepcopy(model), RLMForSequenceClassification(model.config)):
        trainer = Trainer(subject, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
        expected = {name for name, p in subject.named_parameters(remove_duplicate=False) if p.dim() > 1}
        assert set(trainer.get_decay_parameter_names(subject)) == expected


def test_lora_on_embedding_and_head_acts(make_model, tokens):
    from peft import LoraConfig, get_peft_model

    model = make_model(tie_embeddings=False).double()
    names = ["embed_tokens", "lm_head"]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=names, init_lora_weights=False))
    output = adapted(tokens, labels=tokens)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.parameters() if p.requires_grad)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, output.logits)


def test_adapters_on_norms_and_on_phi_act(make_model, tokens):
    from peft import LNTuningConfig, LoraConfig, get_peft_model

    norms = ["input_layernorm", "post_attention_layernorm", "norm", "q_norm"]
    for options in (
        LNTuningConfig(target_modules=norms, task_type="CAUSAL_LM"),
        LoraConfig(r=2, target_modules=[], target_parameters=["attn_mhc.phi", "mlp_mhc.phi"], init_lora_weights=False),
    ):
        model = make_model(qk_norm=True)
        before = model(tokens).logits.detach()
        adapted = get_peft_model(model, options)
        trained = [p for p in adapted.parameters() if p.requires_grad]
        with torch.no_grad():
            for p in trained:
                p.mul_(3.0)
        output = adapted(tokens, labels=tokens)
        assert (output.logits - before).abs().max() > 1e-2
        output.loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in trained)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_of_peft_learn(make_model, tokens, kind):
    import peft

    adapted = peft.get_peft_model(make_model(), getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4))
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad.any() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("changes", [{}, {"mhc_preset": "deepseek_v4"}], ids=str)
def test_weights_that_accelerate_offloads_come_back_for_a_forward(make_model, tokens, changes, tmp_path):
    from accelerate import cpu_offload

    model = make_model(**changes)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path / "model")
    names = [f"model.{name}" for name, _ in model.model.named_children() if name != "layers"]
    where = {**dict.fromkeys(["lm_head", *names], "cpu"), "model.layers.0": "cpu", "model.layers.1": "disk"}
    options = dict(device_map=where, offload_folder=tmp_path / "offloaded")
    # To rounding: weights mapped from a file are off 64 bytes, and some CPUs sum them in another order.
    torch.testing.assert_close(RLMModel.from_pretrained(tmp_path / "model", **options)(tokens).logits, expected)
    torch.testing.assert_close(cpu_offload(model, execution_device="cpu")(tokens).logits, expected)


def test_trainer_smooths_the_labels_of_the_next_token(make_model, tokens, tmp_path):
    model = make_model()
    options = dict(label_smoothing_factor=1e-6, report_to=[], use_cpu=True)
    trainer = Trainer(model, TrainingArguments(str(tmp_path), **options))
    smoothed = trainer.compute_loss(model, {"input_ids": tokens, "labels": tokens})
    torch.testing.assert_close(smoothed, model(tokens, labels=tokens).loss, rtol=1e-4, atol=0)


@pytest.mark.slow
def test_lm_eval_on_a_task_of_ones_own(checkpoint, tmp_path, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": "stream matrix", "choices": [" row", " column"], "answer": n % 2} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "words.yaml").write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    result = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={checkpoint}",
        tasks=["words"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
    )
    # The same question four times, the answers by turns: half of them are right, whatever the model.
    assert result["results"]["words"]["acc,none"] == 0.5


@pytest.mark.slow
def test_transformers_serve_answers_as_openai_does(checkpoint, tmp_path):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "rlm_mhc.model", "serve", str(checkpoint), "--port", str(port), "--device", "cpu"]
    log = (tmp_path / "log").open("w")
    with log, subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"}) as server:
        try:

            def ask(path, body=None):
                data = (
                    None if body is None else json.dumps({"model": str(checkpoint), "max_tokens": 4, **body}).encode()
                )
                headers = {"Content-Type": "application/json"}
                request = urllib.request.Request(f"http://localhost:{port}/{path}", data, headers)
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.load(answer)

            for _ in range(120):
                try:
                    ask("health")
                    break
                except OSError:
                    assert server.poll() is None, (tmp_path / "log").read_text()
                    time.sleep(0.5)
            greedy = {"temperature": 0.0}
            text = ask("v1/completions", {"prompt": "stream", **greedy})
            chat = ask("v1/chat/completions", {"messages": [{"role": "user", "content": "row"}], **greedy})
            with pytest.raises(urllib.error.HTTPError) as refused:
                ask("v1/completions", {"prompt": "stream", "max_tokens": 64, **greedy})
            refusal = json.load(refused.value)["error"]
        finally:
            server.terminate()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    expected = model.generate(**tokenizer("stream", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert text["choices"][0]["text"] == tokenizer.decode(expected[0, 1:], skip_special_tokens=True)
    assert chat["choices"][0]["message"]["role"] == "assistant"
    assert chat["usage"]["completion_tokens"] == 4
    assert refused.value.code == 400
    assert refusal["code"] == "context_length_exceeded"
    assert "65, more than max_seq_len=64" in refusal["message"]


def test_a_program_that_does_not_import_the_package_is_led_to_it(checkpoint):
    code = (
        "from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer\n"
        f"folder = {str(checkpoint)!r}\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\n"
        "print(type(model).__module__, model(**tokenizer('stream', return_tensors='pt')).logits.shape)\n"
        "for auto in AutoModel, AutoModelForSequenceClassification:\n"
        "    print(type(auto.from_pretrained(folder, trust_remote_code=True)).__module__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    kinds = ["rlm_mhc.model.lm torch.Size([1, 1, 300])", "rlm_mhc.model.backbone", "rlm_mhc.model.classifier"]
    assert done.stdout.splitlines() == kinds, done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("no_shape_checks")
def test_one_compiled_graph_serves_every_position_of_a_static_cache(make_model, tokens):
    from transformers import StaticCache

    model = make_model(mhc_sinkhorn_iters=2)
    step = torch.compile(model.forward, fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(tokens[:, :4], past_key_values=cache)
        parts = [step(tokens[:, at : at + 1], past_key_values=cache).logits for at in range(4, 9)]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens).logits[:, 4:], rtol=1e-4, atol=1e-4)
