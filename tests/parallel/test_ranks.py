"""Two processes of the main job on the CPU, as torchrun starts them."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlm_mhc.checkpoint import load_run
from rlm_mhc.fn import adamw_init
from rlm_mhc.testing import assert_trees_close
from rlm_mhc.testing.runs import SMALL_RUN, read_metrics, run_python

RECIPE = Path(__file__).parents[2] / "recipes" / "pretrain_1b.py"
ON_A_SLOW_DISK = f"""
import runpy, time
from rlm_mhc.checkpoint import run
run.sync_tree = lambda folder: time.sleep(8)
runpy.run_path("{RECIPE}", run_name="__main__")
"""
SMALL = [*SMALL_RUN, "model.num_layers=3", "training.eval_steps=10", "training.eval_batches=3"]


@pytest.fixture
def data(corpus):
    return f"data.train_path={corpus}"


def torchrun(*arguments):
    agent = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return run_python(*agent, RECIPE, *SMALL, *arguments)


def alone(*arguments):
    return run_python(RECIPE, *SMALL, *arguments)


def losses(folder):
    return [(r["step"], r["tokens"], r["train/loss"], r.get("eval/loss")) for r in read_metrics(folder)]


@pytest.mark.slow
def test_two_ranks_train_as_one_process_with_the_same_global_batch(data, tmp_path):
    """It fails where the gradients are not summed: then the weights of rank 0 see half of the data."""
    together = torchrun(data, "training.max_steps=20", "training.batch_size=2", f"output_dir={tmp_path / 'two'}")
    assert together.returncode == 0, together.stderr
    single = alone(data, "training.max_steps=20", "training.batch_size=4", f"output_dir={tmp_path / 'one'}")
    assert single.returncode == 0, single.stderr
    two, one = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert [row[:2] for row in two] == [row[:2] for row in one]
    assert len(two) == 20
    for (_, _, a, a_eval), (_, _, b, b_eval) in zip(two, one, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
        assert (a_eval is None) == (b_eval is None)
    checkpoints = [load_run(tmp_path / name / "checkpoints" / "checkpoint-20", adamw_init) for name in ("two", "one")]
    assert_trees_close(checkpoints[0].params, checkpoints[1].params, 1e-3)
    assert checkpoints[0].trainer_state["position"] == checkpoints[1].trainer_state["position"]
    assert "2 ranks" in together.stdout
    assert together.stdout.count("sample text") == 1


def start(rank, port, recipe, *arguments):
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(recipe), *SMALL, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def two_ranks():
    started = []

    def launch(*arguments, of_second=(), recipe=RECIPE):
        port = free_port()
        started.extend(start(rank, port, recipe, *arguments, *extra) for rank, extra in enumerate(((), of_second)))
        return started

    yield launch
    for process in started:
        process.kill()


def wait_for_steps(folder):
    """Until a few steps are logged."""
    metrics, end = folder / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 3):
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("dying", [0, 1])
def test_a_rank_that_dies_ends_the_other_within_a_minute_and_is_named(data, tmp_path, two_ranks, dying):
    out = tmp_path / "run"
    ranks = two_ranks(data, f"output_dir={out}", "training.max_steps=100000", "training.batch_size=2")
    wait_for_steps(out)
    ranks[dying].kill()
    died = time.monotonic()
    _, errors = ranks[1 - dying].communicate(timeout=90)
    assert time.monotonic() - died < 60
    assert ranks[1 - dying].returncode != 0
    last = errors.rstrip().splitlines()[-1]
    assert f"rank {1 - dying} ends because" in last
    assert f"rank {dying}" in last.split("because")[1]


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_all_in_the_same_step_and_one_process_goes_on_from_there(data, tmp_path, two_ranks):
    out, other = tmp_path / "run", tmp_path / "other"
    common = [data, "training.scheduler.min_lr_ratio=1"]  # no cosine, which would depend on max_steps
    ranks = two_ranks(*common, f"output_dir={out}", "training.max_steps=100000", "training.batch_size=2")
    wait_for_steps(out)
    ranks[1].send_signal(signal.SIGTERM)
    said = [rank.communicate(timeout=90) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert f"saved as {checkpoint}" in said[0][0].splitlines()[-1]
    saved = load_run(checkpoint, adamw_init)
    first, second = saved.generators  # one state by rank, of seeds of their own
    assert not first["torch"].equal(second["torch"])

    step = saved.trainer_state["step"]
    one_process = [*common, f"training.max_steps={step + 3}", "training.batch_size=4"]
    went_on = alone(*one_process, f"output_dir={out}", "resume=auto")
    assert went_on.returncode == 0, went_on.stderr
    assert "changed      training.batch_size: 2 before, 4 now" in went_on.stdout
    assert alone(*one_process, f"output_dir={other}").returncode == 0
    a, b = losses(out), losses(other)
    assert [row[:2] for row in a] == [row[:2] for row in b] == [(n, b[0][1] * n) for n in range(1, step + 4)]
    assert [row[2] for row in a] == pytest.approx([row[2] for row in b], rel=1e-5)


@pytest.mark.slow
def test_one_process_replays_a_bad_step_of_two_ranks_with_the_batch_of_both(data, tmp_path, two_ranks):
    """On a slow disk: the second rank has nothing to write, and must not end the first meanwhile."""
    recipe = tmp_path / "slow.py"
    recipe.write_text(ON_A_SLOW_DISK)
    wild = ["training.optimizer.lr=1e30", "training.scheduler.warmup_steps=0", "training.max_bad_steps=2"]
    ranks = two_ranks(data, f"output_dir={tmp_path / 'run'}", "training.batch_size=2", *wild, recipe=recipe)
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert all(rank.returncode != 0 for rank in ranks), said
    (folder,) = (tmp_path / "run" / "bad_steps").iterdir()
    assert folder.name == "checkpoint-3"  # and no half of it
    replayed = run_python(RECIPE.with_name("replay.py"), folder)
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    assert "8 sequences of" in replayed.stdout  # 2 ranks × 2 microbatches × 2
    assert replayed.stdout.endswith("reproduced: every number is as recorded\n")


@pytest.mark.slow
def test_a_mistake_on_the_first_rank_is_told_to_the_other(data, tmp_path, two_ranks):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    ranks = two_ranks(data, f"output_dir={tmp_path / 'run'}", "training.batch_size=2")
    _, errors = ranks[1].communicate(timeout=90)
    assert ranks[1].returncode != 0
    last = errors.rstrip().splitlines()[-1]
    assert "rank 1 ends because rank 0 failed" in last
    assert "already holds a run" in last


@pytest.mark.slow
def test_ranks_that_differ_are_refused(data, tmp_path, two_ranks):
    common = [data, f"output_dir={tmp_path / 'run'}", "training.max_steps=2", "training.batch_size=2"]
    ranks = two_ranks(*common, of_second=["training.optimizer.lr=1e-3"])
    outcomes = [rank.communicate(timeout=120) for rank in ranks]
    assert all(rank.returncode != 0 for rank in ranks)
    assert any("rank 1 differs from rank 0 in config" in errors for _, errors in outcomes), outcomes
