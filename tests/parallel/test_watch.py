"""The watch over two ranks, in one process, on a store in memory."""

import threading
import time

import pytest
import torch.distributed as dist

from rlm_mhc.parallel import Ranks
from rlm_mhc.parallel.watch import Watch


@pytest.fixture
def pair():
    """Two watches on one store, with what each was ended for."""
    store, said = dist.HashStore(), ([], [])
    watches = [Watch(store, Ranks(rank, 2), 0.6, 0.05, said[rank].append) for rank in range(2)]
    for watch in watches:
        watch.heard = {rank: (last, time.monotonic()) for rank, (last, _) in watch.heard.items()}
        watch.start()
    yield watches, said
    for watch in watches:
        watch.stopped.set()


def test_ranks_that_live_are_left_alone_and_one_that_is_done_is_not_missed(pair):
    (first, second), said = pair
    time.sleep(1.0)
    second.stop("done")
    time.sleep(1.0)
    assert said == ([], [])
    assert first.heard == {}


def test_one_that_fails_is_named_with_its_error(pair):
    (_, second), said = pair
    time.sleep(0.2)
    second.stop("failed: no such file")
    time.sleep(0.3)
    assert said[0][0] == "rank 1 failed: no such file"


def test_one_that_vanishes_is_named(pair):
    (_, second), said = pair
    time.sleep(0.2)
    second.stopped.set()
    time.sleep(1.2)
    assert "rank 1 has not been heard of" in said[0][0]


def test_a_store_that_hangs_is_noticed_and_not_waited_for():
    class Hanging(dist.HashStore):
        def set(self, *arguments):
            threading.Event().wait()

    said = []
    watch = Watch(Hanging(), Ranks(0, 2), 0.4, 0.05, said.append)
    watch.start()
    time.sleep(0.8)
    assert "the rendezvous no longer answers" in said[0]
    started = time.monotonic()
    watch.stop("done")
    assert time.monotonic() - started < 2
