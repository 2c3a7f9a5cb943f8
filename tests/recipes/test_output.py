"""A run's folder: held by one run at a time, gone on in, branched off in, and started over in."""

import errno
import fcntl
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlm_mhc.testing.runs import SMALL_RUN
from rlm_mhc.train.lock import locked

RECIPES = Path(__file__).parents[2] / "recipes"


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def saved(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def refuse(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def run(pretrain, corpus, out):
    return lambda *arguments: pretrain(f"data.train_path={corpus}", f"output_dir={out}", *arguments)


@pytest.fixture
def finished(run, out):
    """A folder with the checkpoints 1, 2 and 3."""
    assert run("training.max_steps=3", "training.save_steps=1").code == 0
    return out


def test_a_second_run_is_refused_while_the_first_lives_and_goes_on_once_it_was_killed(run, recipe, corpus, out):
    command = [sys.executable, str(RECIPES / "pretrain_1b.py"), *SMALL_RUN, f"data.train_path={corpus}"]
    more = ["training.max_steps=100000", "training.save_steps=2", "training.save_total_limit=100000"]
    with subprocess.Popen([*command, f"output_dir={out}", *more], stdout=subprocess.DEVNULL) as first:
        try:
            while first.poll() is None and not (out / "checkpoints" / "checkpoint-2").is_dir():
                time.sleep(0.05)
            for how in ("resume=auto", "overwrite=true", "resume=never"):
                refused = run(*more, how)
                assert refused.code == 2
                assert f"output_dir={out}: in use by process {first.pid} on " in refused.last_error
            read = recipe(
                "generate", f"checkpoint={out / 'checkpoints' / 'checkpoint-2'}", "prompt=stream", "max_new_tokens=2"
            )
            assert read.code == 0, read.err
            assert first.poll() is None
        finally:
            first.kill()
    logged = len(steps(out))
    result = run(f"training.max_steps={logged + 2}", "resume=auto")
    assert result.code == 0, result.err
    assert steps(out) == list(range(1, logged + 3))


def test_a_folder_is_held_no_longer_than_the_run_and_a_lock_is_no_run(run, out):
    out.mkdir()
    with locked(out):
        assert "in use by process" in run("training.max_steps=1").last_error
    assert run("training.max_steps=1").code == 0


def test_without_locks_a_run_goes_on(run, out, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert run("training.max_steps=1").code == 0


def test_nothing_newer_is_replaced_unasked(run, finished):
    first, newest = (finished / "checkpoints" / f"checkpoint-{step}" for step in (1, 3))
    refused = run("training.max_steps=2", f"+resume_from_checkpoint={first}")
    assert refused.code == 2
    assert "2 checkpoints after checkpoint-1, up to checkpoint-3" in refused.last_error
    assert "overwrite=true" in refused.last_error
    assert saved(finished) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert run("training.max_steps=4", f"+resume_from_checkpoint={newest}").code == 0
    assert steps(finished) == [1, 2, 3, 4]


def test_what_a_branch_replaces_stays_until_it_has_a_checkpoint_and_nothing_goes_on_from_it(run, finished, monkeypatch):
    first = finished / "checkpoints" / "checkpoint-1"
    with monkeypatch.context() as full:
        full.setattr("rlm_mhc.checkpoint.run.sync_tree", refuse)
        ended = run("training.max_steps=2", f"+resume_from_checkpoint={first}", "overwrite=true")
    assert ended.code == 2
    said = [line.split(" is now ")[1] for line in ended.out.splitlines() if line.startswith("replaced ")]
    assert said == ["checkpoint-3.replaced", "checkpoint-2.replaced"]
    assert saved(finished) == ["checkpoint-1", "checkpoint-2.replaced", "checkpoint-3.replaced"]
    result = run("training.max_steps=2", "resume=auto")
    assert f"resumed      {first}" in result.out
    assert saved(finished) == ["checkpoint-1", "checkpoint-2"]
    assert steps(finished) == [1, 2]


@pytest.mark.parametrize("failing", ["rlm_mhc.train.output.sync", "shutil.rmtree"])
def test_no_run_goes_on_that_was_to_be_started_over(run, finished, monkeypatch, failing):
    """Whether starting over ends with its first change, or the former checkpoints cannot be removed."""

    def removing(path, ignore_errors=False):
        if not ignore_errors:
            refuse()

    with monkeypatch.context() as broken:
        broken.setattr(failing, removing if failing == "shutil.rmtree" else refuse)
        broken.setattr("rlm_mhc.checkpoint.run.sync_tree", refuse)
        assert run("training.max_steps=2", "overwrite=true").code == 2
    result = run("training.max_steps=2", "resume=auto")
    assert result.code == 0, result.err
    assert "resumed" not in result.out
    assert saved(finished) == ["checkpoint-2"]
    assert steps(finished) == [1, 2]
    assert not list(finished.glob(".checkpoints*"))


def test_a_tokenizer_that_the_disk_does_not_take_does_not_end_the_run(run, finished, monkeypatch):
    from transformers import PreTrainedTokenizerBase

    def full(*_, **__):
        raise Exception("No space left on device (os error 28)")

    shutil.rmtree(finished / "checkpoints" / "checkpoint-3")
    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    result = run("training.max_steps=5", "training.save_steps=1", "resume=auto")
    assert result.code == 2
    assert (result.out + result.err).count("No space left on device (os error 28)); the training goes on") == 3
    assert "its last checkpoint could not be written" in result.last_error
    assert steps(finished) == [1, 2, 3, 4, 5]
