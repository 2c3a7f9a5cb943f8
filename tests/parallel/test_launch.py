"""What the environment says about the ranks, and how they meet whatever an earlier attempt left."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from rlm_mhc.parallel.launch import Launch, expand_hosts, read_launch
from rlm_mhc.parallel.ranks import name_attempt
from rlm_mhc.train import pick_device

STEP = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_NODELIST": "gpu[08-09]"}
JOB = STEP | {"SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"} | {
    "MASTER_ADDR": "head",
    "MASTER_PORT": "1234",
}
SCRIPT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "9", "SLURM_NODELIST": "n1"}


@pytest.mark.parametrize(
    ("environ", "launch"),
    [
        ({}, Launch()),
        (TORCHRUN, Launch(5, 8, 2, 4, "head", 1234, "torchrun")),
        (TORCHRUN | JOB, Launch(5, 8, 2, 4, "head", 1234, "torchrun")),
        (STEP, Launch(3, 4, 1, 2, "gpu08", 29500, "srun")),
        (JOB, Launch(3, 4, 1, 2, "gpu08", 10000 + 3456, "srun")),
        (JOB | {"MASTER_ADDR": "::1", "MASTER_PORT": "7"}, Launch(3, 4, 1, 2, "::1", 7, "srun")),
        (JOB | {"WORLD_SIZE": "4"}, Launch(3, 4, 1, 2, "gpu08", 10000 + 3456, "srun")),  # exported by a batch script
        # A step within a larger job; a step of one task; two steps of a job at once.
        (
            JOB | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "gpu09"},
            Launch(0, 2, 1, 2, "gpu09", 13456, "srun"),
        ),
        (JOB | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Launch()),
        (JOB | {"SLURM_STEP_ID": "1"}, Launch(3, 4, 1, 2, "gpu08", 10000 + 3456 + 1009, "srun")),
        # A batch script, and shells of salloc, start one process.
        (SCRIPT | {"ENVIRONMENT": "BATCH"}, Launch()),
        (SCRIPT | {"SLURM_JOB_NAME": "interactive"}, Launch()),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "9", "SLURM_NODELIST": "n1"}, Launch()),
        (JOB | {"ENVIRONMENT": "BATCH"}, Launch(3, 4, 1, 2, "gpu08", 13456, "srun")),  # srun passes that on
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} | JOB, Launch()),
    ],
)
def test_ranks_of_torchrun_and_of_srun(environ, launch):
    assert read_launch(environ) == launch


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 but no RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "no LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (JOB | {"SLURM_NTASKS": "two"}, "SLURM_NTASKS=two: expected a whole number"),
        (JOB | {"SLURM_NODELIST": "gpu[08-"}, "no SLURM node list"),
        (JOB | {"SLURM_NODELIST": "gpu[a-b]"}, "'a-b' is neither a number nor a range"),
    ],
)
def test_what_is_missing_or_malformed_is_named(environ, message):
    with pytest.raises(ValueError, match=message):
        read_launch(environ)


@pytest.mark.parametrize(
    ("hosts", "names"),
    [
        ("", []),
        ("localhost", ["localhost"]),
        ("node[01-03,7],other-1", ["node01", "node02", "node03", "node7", "other-1"]),
        ("a[098-101]", ["a098", "a099", "a100", "a101"]),
        (
            "n[9-11],n[1-2]x[3,5].cluster",
            ["n9", "n10", "n11", *(f"n{n}x{x}.cluster" for n in (1, 2) for x in (3, 5))],
        ),
        ("127.0.0.1,b", ["127.0.0.1", "b"]),
    ],
)
def test_node_lists(hosts, names):
    assert list(expand_hosts(hosts)) == names


def test_a_task_that_srun_binds_to_one_device_takes_that_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    for count, index in ((1, 0), (4, 1)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert pick_device("auto") == torch.device("cuda", index)


def meet(store, world=3, timeout=timedelta(seconds=20)):
    """The names that ranks in threads agree on; the first one comes last."""
    late = threading.Event()

    def run(rank):
        if rank == 0:
            late.wait(0.3)
        return name_attempt(store, rank, world, timeout)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))


def test_attempts_on_one_store_have_names_of_their_own():
    """The ranks of the second attempt find the name and the signs of the first one in the store."""
    store = dist.HashStore()
    names = [meet(store) for _ in range(3)]
    assert [len(set(attempt)) for attempt in names] == [1, 1, 1]
    assert len({attempt[0] for attempt in names}) == 3
    assert len(set(meet(store, world=2))) == 1  # fewer ranks than before


def test_a_rank_that_does_not_come_is_waited_for_no_longer_than_said():
    for rank in (0, 1):
        with pytest.raises(RuntimeError):
            name_attempt(dist.HashStore(), rank, 2, timedelta(seconds=0.2))
