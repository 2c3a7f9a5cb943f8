import json
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = [
    "model=tiny",
    "model.hidden_dim=32",
    "model.num_layers=2",
    "model.vocab_size=300",
    "model.max_seq_len=64",
    "model.mhc_sinkhorn_iters=5",
    "data.max_length=16",
    "training.batch_size=2",
    "training.gradient_accumulation_steps=2",
    "training.mixed_precision=fp32",
    "training.compile=false",
    "training.scheduler.warmup_steps=2",
    "training.optimizer.lr=3e-3",
    "training.logging_steps=1",
    "training.eval_steps=2",
    "training.eval_batches=2",
    "device=cpu",
]


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def last_error(self):
        return self.err.rstrip().splitlines()[-1]


@pytest.fixture
def recipe(monkeypatch, capfd):
    """Run a recipe as its command line would, in this process."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [str(RECIPES / f"{name}.py"), *arguments])
        GlobalHydra.instance().clear()
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
        return Result(stopped.value.code or 0, *capfd.readouterr())

    return run


@pytest.fixture
def pretrain(recipe):
    return lambda *arguments: recipe("pretrain_1b", *SMALL, *arguments)


@pytest.fixture
def corpus(tmp_path):
    rng = np.random.default_rng(0)
    words = ["stream", "matrix", "row", "column", "gain", "token", "layer", "head"]
    lines = [json.dumps({"text": " ".join(rng.choice(words, size=20))}) for _ in range(30)]
    file = tmp_path / "corpus.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return str(file)
