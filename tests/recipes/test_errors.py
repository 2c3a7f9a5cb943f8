"""Every mistake ends with a non-zero code and a last line on stderr that names the culprit and the remedy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"

MISTAKES = {
    "modle=tiny": ["unknown key 'modle'", "did you mean 'model'"],
    "model=tny": ["model=tny", "base_1b, large_7b, small_125m, tiny", "did you mean 'tiny'"],
    "model.hiden_dim=3": ["unknown key 'model.hiden_dim'", "did you mean 'model.hidden_dim'"],
    "+model.hiden_dim=3": ["unknown key 'model.hiden_dim'", "did you mean 'hidden_dim'"],
    "training.optimiser.lr=1": ["training.optimiser", "did you mean 'training.optimizer"],
    "training.batch_size=many": ["training.batch_size='many'", "whole number"],
    "training.batch_size=1e3": ["training.batch_size=1000.0", "whole number"],
    "training.compile=maybe": ["training.compile='maybe'", "true or false"],
    "training=3": ["training"],
    "training.optimizer=3": ["training.optimizer=3", "group of keys"],
    "training.optimizer.lr=-1": ["training.optimizer.lr=-1", "above 0"],
    "training.optimizer.lr=nan": ["training.optimizer.lr=nan", "above 0"],
    "training.optimizer.betas=[0.9,2]": ["training.optimizer.betas", "from 0"],
    "model.num_heads=3": ["model.num_heads=3", "divide hidden_dim=32"],
    "model.num_kv_heads=3": ["model.num_kv_heads=3", "divide num_heads=4"],
    "model.mhc_flows=0": ["model.mhc_flows=0", "from 1 to 256"],
    "model.mhc_projection=unconstrained": ["mhc_projection='unconstrained'", "use mhc_preset='hc'"],
    "training.mixed_precision=fp8": ["training.mixed_precision='fp8'", "bf16, fp16, fp32"],
    "training.remat=ful": ["training.remat='ful'", "none, mhc, full", "did you mean 'full'"],
    "training.remat=mhc model.mhc_enabled=false": ["remat='mhc'", "the model has none"],
    "training.attention=flash_attn": ["CUDA in bf16 or fp16 only", "attention=torch"],
    "parallel.strategy=zero3": ["parallel.strategy='zero3'", "not in this version"],
    "device=tpu": ["device='tpu'", "auto, cpu, cuda"],
    "+resume_from_checkpoint=/nowhere": ["/nowhere", "no such folder"],
    "data.max_length=65": ["data.max_length=65", "model.max_seq_len=64"],
    "data.train_path=/nowhere.jsonl": ["data.train_path=/nowhere.jsonl", "no such file"],
    "data.tokenizer=/nowhere": ["data.tokenizer=/nowhere", "cannot be loaded"],
    "seed": ["'seed'", "key=value"],
    "model.hidden_dim={": ["model.hidden_dim={", "key=value"],
    f"model.vocab_size={10**400}": ["model.vocab_size=1000", "too large"],
    f"training.optimizer.lr={10**400}": ["training.optimizer.lr=1000", "too large"],
    "seed=9999999999999999999999": ["seed=9999999999", "too large"],
    "resume=always": ["resume='always'", "never, auto"],
}


@pytest.mark.parametrize("argument", MISTAKES)
def test_a_mistake_on_the_command_line(pretrain, corpus, tmp_path, argument):
    common = [f"data.train_path={corpus}", f"output_dir={tmp_path / 'run'}", "training.max_steps=1"]
    result = pretrain(*common, *argument.split())
    assert result.code == 2
    assert result.last_error.startswith("error: ")
    assert all(word in result.last_error for word in MISTAKES[argument]), result.last_error
    assert "Traceback" not in result.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty"]),
        (b'{"text": "a"}\nnonsense\n', ["line 2", "not JSON"]),
        (b'{"body": "a"}\n', ["line 1", "no field 'text'", "data.text_field"]),
        (b'{"text": ["a"]}\n', ["line 1", "not a string"]),
        (b"\x7fELF\x02\x01\x01\x00\xff\xfe", ["binary"]),
    ],
)
def test_a_mistake_in_the_data(pretrain, tmp_path, content, words):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    result = pretrain(f"data.train_path={file}", f"output_dir={tmp_path / 'run'}", "training.max_steps=1")
    assert result.code == 2
    assert all(word in result.last_error for word in [str(file), *words]), result.last_error
    assert "Traceback" not in result.err


def test_a_checkpoint_of_another_shape_or_damaged(pretrain, corpus, tmp_path):
    common = [f"data.train_path={corpus}", "training.max_steps=1"]
    assert pretrain(*common, f"output_dir={tmp_path / 'a'}").code == 0
    checkpoint = tmp_path / "a" / "checkpoints" / "checkpoint-1"
    resume = [*common, f"output_dir={tmp_path / 'b'}", f"+resume_from_checkpoint={checkpoint}"]
    other = pretrain(*resume, "model.num_layers=3")
    assert other.code == 2
    assert "it has num_layers=2, model.num_layers is 3" in other.last_error
    (checkpoint / "model.safetensors").write_bytes(b"12345678")
    damaged = pretrain(*resume)
    assert damaged.code == 2
    assert "model.safetensors: damaged" in damaged.last_error


@pytest.mark.parametrize(
    "size",
    [
        "model.hidden_dim=65536",
        "model.hidden_dim=4000000000000",
        "model.vocab_size=9000000000000000000",
        "training.batch_size=1e9",
    ],
)
def test_a_model_that_cannot_fit_is_stopped_with_advice(pretrain, tmp_path, size):
    result = pretrain(f"output_dir={tmp_path / 'run'}", size.replace("1e9", "1000000000"), "model.num_layers=200")
    assert result.code == 2
    assert "GiB" in result.last_error
    assert "smaller model" in result.last_error


def test_an_output_dir_that_is_a_file(pretrain, corpus, tmp_path):
    (tmp_path / "file").touch()
    result = pretrain(f"data.train_path={corpus}", f"output_dir={tmp_path / 'file'}")
    assert result.code == 2
    assert "a file is in its place" in result.last_error


def test_debug_shows_the_traceback(pretrain):
    result = pretrain("model.mhc_flows=0", "debug=true")
    assert "Traceback" in result.err
    assert result.last_error.startswith("error: ")


def test_in_a_process_of_its_own():
    command = [sys.executable, str(RECIPES / "pretrain_1b.py"), "model.mhc_flows=0"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert done.stderr == "error: model.mhc_flows=0: expected a number from 1 to 256\n"
