from pathlib import Path
from typing import NamedTuple

import pytest

from rlm_mhc.testing.runs import SMALL_RUN, run_script

RECIPES = Path(__file__).parents[2] / "recipes"


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def last_error(self):
        return self.err.rstrip().splitlines()[-1]


@pytest.fixture
def recipe(capfd):
    """Run a recipe as its command line would, in this process."""

    def run(name, *arguments):
        capfd.readouterr()
        return Result(run_script(RECIPES / f"{name}.py", *arguments), *capfd.readouterr())

    return run


@pytest.fixture
def pretrain(recipe):
    return lambda *arguments: recipe("pretrain_1b", *SMALL_RUN, *arguments)
