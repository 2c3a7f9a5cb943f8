"""The main job from the command line, on small data."""

import json
import shutil

import pytest
import torch
import yaml

import rlm_mhc
from rlm_mhc.checkpoint import load_run
from rlm_mhc.fn import adamw_init
from rlm_mhc.testing import assert_trees_close
from rlm_mhc.testing.runs import read_metrics

LOGGED = {
    "step",
    "tokens",
    "train/loss",
    "train/lr",
    "grad_norm",
    "mhc/amax_pre",
    "mhc/amax_post",
    "mhc/gain_forward",
    "mhc/gain_backward",
}


def test_a_run_leaves_the_documented_files_and_a_lower_loss(pretrain, corpus, tmp_path):
    out = tmp_path / "run"
    arguments = [f"data.train_path={corpus}", f"output_dir={out}", "training.max_steps=8", "training.save_steps=3"]
    result = pretrain(*arguments, "training.save_total_limit=2")
    assert result.code == 0, result.err
    assert "parameters" in result.out
    assert "sample text" in result.out
    rows = read_metrics(out)
    assert [r["step"] for r in rows] == list(range(1, 9))
    assert all(row.keys() >= LOGGED for row in rows)
    assert rows[2].keys() >= {"tokens_per_sec", "mfu"}
    assert [r["step"] for r in rows if "eval/loss" in r] == [1, 2, 4, 6, 8]
    assert [r["step"] for r in rows if r.get("save_stall", 0) > 0] == [4, 7]
    assert rows[-1]["eval/loss"] < rows[0]["eval/loss"] - 0.2
    assert rows[2]["tokens"] == 3 * 2 * 2 * 16
    layers = rows[0]["mhc/layers"]
    assert layers.keys() == {"amax", "gain_forward", "gain_backward", "row_error", "column_error", "dominance"}
    assert {len(values) for values in layers.values()} == {2}
    assert layers["gain_backward"][0] == rows[0]["mhc/gain_backward"]
    assert "amplify" not in result.err
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["model"]["hidden_dim"] == 32
    assert config["training"]["max_steps"] == 8
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["checkpoint-6", "checkpoint-8"]
    names = {p.name for p in (out / "checkpoints" / "checkpoint-8").iterdir()}
    expected = {
        "config.yaml",
        "config.json",
        "model.safetensors",
        "optimizer.pt",
        "trainer_state.json",
        "tokenizer.json",
    }
    assert names >= expected


def test_a_gain_out_of_its_range_is_warned_of_once_with_what_to_do(pretrain, corpus, tmp_path):
    arguments = [f"data.train_path={corpus}", "training.max_steps=3", "mhc.target_amax=0.5"]
    result = pretrain(*arguments, f"output_dir={tmp_path / 'paper'}")
    assert result.code == 0, result.err
    said = result.out + result.err
    assert said.count("the residual mappings amplify: mhc/") == 1
    assert "step 1: " in said
    assert "above mhc.target_amax=0.5; raise model.mhc_sinkhorn_iters" in said
    result = pretrain(*arguments, f"output_dir={tmp_path / 'hc'}", "model.mhc_preset=hc")
    assert "use model.mhc_preset=paper" in result.out + result.err


@pytest.mark.parametrize("preset", ["deepseek_v4", "single_pass", "orthostochastic"])
def test_other_presets_train_save_and_go_on(pretrain, corpus, tmp_path, preset):
    out = tmp_path / "run"
    arguments = [f"data.train_path={corpus}", f"output_dir={out}", f"model.mhc_preset={preset}"]
    assert pretrain(*arguments, "training.max_steps=8", "training.save_steps=4").code == 0
    rows = read_metrics(out)
    assert rows[-1]["eval/loss"] < rows[0]["eval/loss"] - 0.1
    shutil.rmtree(out / "checkpoints" / "checkpoint-8")
    result = pretrain(*arguments, "training.max_steps=8", "resume=auto")
    assert result.code == 0, result.err
    assert read_metrics(out)[-1]["train/loss"] == rows[-1]["train/loss"]


def test_the_checkpoint_reads_back_and_carries_its_tokenizer(pretrain, corpus, tmp_path):
    from transformers import AutoTokenizer

    out = tmp_path / "run"
    assert pretrain(f"data.train_path={corpus}", f"output_dir={out}", "training.max_steps=2").code == 0
    folder = out / "checkpoints" / "checkpoint-2"
    params, config = rlm_mhc.load_pretrained(folder)
    rlm_mhc.save_pretrained(tmp_path / "again", params, config)
    assert_trees_close(rlm_mhc.load_pretrained(tmp_path / "again")[0], params, 0.0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("stream matrix")["input_ids"]) == "stream matrix"
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["step"] == 2
    assert state["position"] == {"seed": 42, "epoch": 0, "offset": 8}


@pytest.mark.parametrize("how", ["auto", "checkpoint"])
def test_a_resumed_run_equals_one_never_stopped(pretrain, corpus, tmp_path, how):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    common = [f"data.train_path={corpus}", "training.max_steps=6", "training.save_steps=3"]
    assert pretrain(*common, f"output_dir={whole}").code == 0
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "checkpoint-6")
    if how == "checkpoint":
        shutil.move(cut / "checkpoints" / "checkpoint-3", tmp_path / "start")
        shutil.rmtree(cut)
        result = pretrain(*common, f"output_dir={cut}", f"+resume_from_checkpoint={tmp_path / 'start'}")
    else:
        result = pretrain(*common, f"output_dir={cut}", "resume=auto")
    assert result.code == 0, result.err
    assert "step 3" in result.out
    a, b = (load_run(run / "checkpoints" / "checkpoint-6", adamw_init) for run in (whole, cut))
    assert_trees_close(a.params, b.params, 0.0)
    assert_trees_close(a.optimizer, b.optimizer, 0.0)
    assert a.trainer_state == b.trainer_state
    steps = [r["step"] for r in read_metrics(cut)]
    assert steps == (list(range(1, 7)) if how == "auto" else [4, 5, 6])
    assert [r["tokens"] for r in read_metrics(cut)] == [64 * step for step in steps]
    losses = {r["step"]: r.get("train/loss") for r in read_metrics(whole)}
    assert all(r.get("train/loss") == losses[r["step"]] for r in read_metrics(cut))


def test_a_used_folder_is_refused_resumed_or_overwritten(pretrain, corpus, tmp_path):
    arguments = [f"data.train_path={corpus}", f"output_dir={tmp_path / 'run'}", "training.max_steps=1"]
    assert pretrain(*arguments).code == 0
    refused = pretrain(*arguments)
    assert refused.code == 2
    assert all(word in refused.last_error for word in ("already holds a run", "resume=auto", "overwrite=true"))
    again = pretrain(*arguments, "overwrite=true")
    assert again.code == 0
    assert "reused" in again.out
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == [1]
    finished = pretrain(*arguments, "resume=auto")
    assert finished.code == 0, finished.err
    assert "nothing left" in finished.out


def test_going_on_inside_a_folder_removes_what_came_later(pretrain, corpus, tmp_path):
    out = tmp_path / "run"
    arguments = [f"data.train_path={corpus}", f"output_dir={out}", "training.save_steps=1"]
    assert pretrain(*arguments, "training.max_steps=3").code == 0
    start = out / "checkpoints" / "checkpoint-1"
    result = pretrain(*arguments, "training.max_steps=2", f"+resume_from_checkpoint={start}", "overwrite=true")
    assert result.code == 0, result.err
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["checkpoint-1", "checkpoint-2"]
    assert [r["step"] for r in read_metrics(out)] == [1, 2]


def test_other_data_take_weights_and_tokenizer_and_start_anew(pretrain, corpus, tmp_path):
    assert pretrain(f"data.train_path={corpus}", f"output_dir={tmp_path / 'a'}", "training.max_steps=2").code == 0
    checkpoint = tmp_path / "a" / "checkpoints" / "checkpoint-2"
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"zebra quagga {i}"}) + "\n" for i in range(300)))
    arguments = [f"data.train_path={other}", f"output_dir={tmp_path / 'b'}", "training.max_steps=3"]
    result = pretrain(*arguments, f"+resume_from_checkpoint={checkpoint}")
    assert result.code == 0, result.err
    assert "its weights and tokenizer; optimizer, schedule and data start anew" in result.out
    new = tmp_path / "b" / "checkpoints" / "checkpoint-3"
    assert json.loads((new / "trainer_state.json").read_text())["position"] == {"seed": 42, "epoch": 0, "offset": 12}
    assert [r["step"] for r in read_metrics(tmp_path / "b")] == [1, 2, 3]
    own = tmp_path / "a"
    result = pretrain(f"data.train_path={other}", f"output_dir={own}", f"resume_from_checkpoint={checkpoint}")
    assert result.code == 2
    assert "choose another folder" in result.last_error
    assert len(read_metrics(own)) == 2
    result = pretrain(*arguments[:1], f"output_dir={own}", "resume=auto")
    assert result.code == 2
    assert "trained on other data" in result.last_error
    assert (new / "tokenizer.json").read_text() == (checkpoint / "tokenizer.json").read_text()


def test_without_mhc_and_in_bf16_and_with_eval_data(pretrain, corpus, tmp_path):
    result = pretrain(
        f"data.train_path={corpus}",
        f"data.eval_path={corpus}",
        f"output_dir={tmp_path / 'run'}",
        "training.max_steps=2",
        "model.mhc_enabled=false",
        "training.mixed_precision=bf16",
    )
    assert result.code == 0, result.err
    params, config = rlm_mhc.load_pretrained(tmp_path / "run" / "checkpoints" / "checkpoint-2")
    assert not config.mhc_enabled
    assert params.layers[0].attn_mhc == ()
    assert params.norm.weight.dtype == torch.float32


def test_a_very_small_file_trains_without_evaluation(pretrain, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "row"}\n')
    arguments = [f"data.train_path={tmp_path / 'one.jsonl'}", f"output_dir={tmp_path / 'run'}", "training.max_steps=2"]
    result = pretrain(*arguments)
    assert result.code == 0, result.err
    assert "no eval/loss" in result.out


def test_shared_cache_and_existing_tokenizer(pretrain, corpus, tmp_path):
    common = [f"data.train_path={corpus}", "training.max_steps=1", f"data.cache_dir={tmp_path / 'cache'}"]
    assert pretrain(*common, f"output_dir={tmp_path / 'a'}").code == 0
    assert "reused" in pretrain(*common, f"output_dir={tmp_path / 'b'}").out
    tokenizer = tmp_path / "a" / "checkpoints" / "checkpoint-1"
    result = pretrain(*common, f"output_dir={tmp_path / 'c'}", f"data.tokenizer={tokenizer}")
    assert result.code == 0, result.err


def test_a_diverging_run_stops_with_a_step_to_replay(pretrain, recipe, corpus, tmp_path):
    arguments = [f"data.train_path={corpus}", f"output_dir={tmp_path / 'run'}", "training.max_steps=30"]
    wild = ["training.optimizer.lr=1e30", "training.scheduler.warmup_steps=0", "training.max_bad_steps=3"]
    result = pretrain(*arguments, *wild)
    assert result.code == 2
    said = result.out + result.err
    assert "layer 0 is the first whose output is not finite" in said
    assert "(3 in a row, 3 end the run)" in said
    assert "3 steps in a row without a finite loss and gradient" in result.last_error
    assert "training.optimizer.lr" in result.last_error
    folder = next((tmp_path / "run" / "bad_steps").iterdir())
    assert f"recipes/replay.py {folder}" in result.last_error
    assert [r["skipped"] for r in read_metrics(tmp_path / "run")][-2:] == [1, 1]
    replayed = recipe("replay", str(folder))
    assert replayed.code == 0, replayed.err
    assert "reproduced" in replayed.out


def test_a_bad_step_that_cannot_be_saved_hides_nothing_of_why_the_run_ended(pretrain, corpus, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "bad_steps").touch()
    arguments = [f"data.train_path={corpus}", f"output_dir={out}", "training.max_steps=30"]
    wild = ["training.optimizer.lr=1e30", "training.scheduler.warmup_steps=0", "training.max_bad_steps=3"]
    result = pretrain(*arguments, *wild)
    assert result.code == 2
    assert "3 steps in a row without a finite loss and gradient" in result.last_error
    assert "could not be saved for recipes/replay.py" in result.last_error
    assert "bad_steps" in result.last_error


def test_fp16_saves_and_resumes_its_loss_scale_and_logs_it(pretrain, corpus, tmp_path):
    out = tmp_path / "run"
    arguments = [f"data.train_path={corpus}", f"output_dir={out}", "training.mixed_precision=fp16"]
    assert pretrain(*arguments, "training.max_steps=2").code == 0
    state = json.loads((out / "checkpoints" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["loss_scale"] == {"scale": 65536.0, "good_steps": 2}
    result = pretrain(*arguments, "training.max_steps=3", "resume=auto")
    assert result.code == 0, result.err
    state = json.loads((out / "checkpoints" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["loss_scale"] == {"scale": 65536.0, "good_steps": 3}
    assert [(r["loss_scale"], r["skipped"]) for r in read_metrics(out)] == [(65536.0, 0)] * 3


@pytest.mark.parametrize("remat", ["mhc", "full"])
def test_recomputation_trains_the_same(pretrain, corpus, tmp_path, remat):
    common = [f"data.train_path={corpus}", "training.max_steps=3"]
    assert pretrain(*common, f"output_dir={tmp_path / 'kept'}").code == 0
    assert pretrain(*common, f"output_dir={tmp_path / 'again'}", f"training.remat={remat}").code == 0
    losses = [[r["train/loss"] for r in read_metrics(tmp_path / name)] for name in ("kept", "again")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
