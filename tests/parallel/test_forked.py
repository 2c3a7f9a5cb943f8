"""Two ranks that are signalled and killed under torchrun's agent, or started by SLURM alone."""

import runpy
from pathlib import Path

import pytest

from rlm_mhc.testing.runs import SMALL_RUN, read_metrics, run_python, write_corpus

FORKED = Path(__file__).with_name("forked.py")
TORTURE = Path(__file__).parents[2] / "recipes" / "torture.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs; see `forked.py`."""
    folder = tmp_path_factory.mktemp("runs")
    write_corpus(folder / "corpus.jsonl")
    arguments = [*SMALL_RUN, "training.batch_size=2", "data.train_path=../corpus.jsonl", "data.cache_dir=../tokens"]
    done = run_python(FORKED, folder, *arguments, timeout=1200)
    (folder / "said").write_text(done.stdout + done.stderr)
    return folder


@pytest.mark.slow
def test_terminated_together_with_torchrun_every_run_leaves_its_last_step_as_a_checkpoint(runs):
    for number in range(10):
        run = runs / f"terminated-{number}" / "run"
        (checkpoint,) = (run / "checkpoints").iterdir()
        last = read_metrics(run)[-1]["step"]
        assert checkpoint.name == f"checkpoint-{last}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["killed", "slurm"])
def test_a_run_whose_ranks_are_killed_and_restarted_or_started_by_srun_ends_as_any_other(runs, name):
    """Records, weights, optimizer and generators, bit by bit."""
    compare = runpy.run_path(str(TORTURE))["compare"]
    assert (runs / name / "run" / "checkpoints" / "checkpoint-16").is_dir(), (runs / "said").read_text()[-3000:]
    assert compare(runs / "whole" / "run", runs / name / "run") == 0
    assert (runs / "said").read_text().count("2 ranks") == 10 + 1 + 3 + 1  # nobody trained alone
