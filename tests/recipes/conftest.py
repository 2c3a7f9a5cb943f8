import json
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra

from rlm_mhc.testing.models import SMALL_RUN

RECIPES = Path(__file__).parents[2] / "recipes"


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
    return lambda *arguments: recipe("pretrain_1b", *SMALL_RUN, *arguments)


@pytest.fixture
def corpus(tmp_path):
    rng = np.random.default_rng(0)
    words = ["stream", "matrix", "row", "column", "gain", "token", "layer", "head"]
    lines = [json.dumps({"text": " ".join(rng.choice(words, size=20))}) for _ in range(30)]
    file = tmp_path / "corpus.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return str(file)
