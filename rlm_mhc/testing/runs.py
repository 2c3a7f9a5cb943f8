"""Small runs of the recipes: arguments, a corpus, and what a run has logged."""

import json
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from hydra.core.global_hydra import GlobalHydra

from rlm_mhc.disk import text_lines

# Runs of recipes that take a moment on a CPU; what is named after it wins.
SMALL_TRAINING = [
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
SMALL_RUN = [
    "model=tiny",
    "model.hidden_dim=32",
    "model.num_layers=2",
    "model.vocab_size=300",
    "model.max_seq_len=64",
    "model.mhc_sinkhorn_iters=5",
    *SMALL_TRAINING,
]
WORDS = ["stream", "matrix", "row", "column", "gain", "token", "layer", "head"]


def write_corpus(file: Path, rows: int = 30) -> Path:
    """Write a JSONL file of so many texts of twenty random words, the same at every call, and return it."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=20)) for _ in range(rows)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the records of `metrics.jsonl` in the folder of a run."""
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in text_lines(file.read_bytes(), str(file))]


def read_losses(run: Path) -> dict[int, float]:
    """Return the training loss of each logged step of a run."""
    return {row["step"]: row["train/loss"] for row in read_metrics(run)}


def run_script(file: Path, *arguments: str) -> int:
    """Run a script in this process as its command line would, and return its exit code."""
    GlobalHydra.instance().clear()
    with mock.patch.object(sys, "argv", [str(file), *arguments]):
        try:
            runpy.run_path(str(file), run_name="__main__")
        except SystemExit as stopped:
            return int(stopped.code or 0)
    return 0


def run_python(*arguments: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Python with one thread in a process of its own, and return its exit code and output."""
    command = [sys.executable, *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout, stdin=subprocess.DEVNULL)
