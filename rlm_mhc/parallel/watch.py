"""A watch over the other ranks: one that dies ends them all within a minute, instead of leaving them to wait."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from rlm_mhc.parallel.ranks import Ranks

BEAT_SECONDS = 2.0
DEAD_AFTER_SECONDS = 25.0


@contextmanager
def watch_ranks(ranks: Ranks, *, dead_after: float = DEAD_AFTER_SECONDS, beat: float = BEAT_SECONDS) -> Iterator[None]:
    """Tell the other ranks every few seconds that this one lives, and end this process when one of them does not.

    A rank that leaves by an error says so, and what the error was; one that vanishes is noticed after `dead_after`
    seconds. Either way the last line on stderr names it. Beats go through the store of the rendezvous, in a thread of
    their own, so that they go on while the rank computes or waits.
    """
    if ranks.world == 1:
        yield
        return
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.PrefixStore("rlm_mhc/watch", dist.TCPStore(host, port, timeout=timedelta(seconds=dead_after)))
    stopped = threading.Event()
    thread = threading.Thread(target=_beat, args=(store, ranks, stopped, dead_after, beat, _end), daemon=True)
    thread.start()
    try:
        yield
    except BaseException as error:
        if _lost_a_peer(error):
            thread.join(dead_after + 3 * beat)  # the watch knows who it was, soon
        _tell(store, ranks.rank, f"failed: {' '.join(str(error).split()) or type(error).__name__}")
        raise
    else:
        _tell(store, ranks.rank, "done")
    finally:
        stopped.set()
        thread.join()


def _lost_a_peer(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in ("gloo", "nccl", "peer"))


def _tell(store: dist.Store, rank: int, what: str) -> None:
    with suppress(RuntimeError):  # the store may have gone with the rank that held it
        store.set(str(rank), what)


def _beat(
    store: dist.Store,
    ranks: Ranks,
    stopped: threading.Event,
    dead_after: float,
    beat: float,
    end: Callable[[str], None],
) -> None:
    heard = {rank: (b"", time.monotonic()) for rank in range(ranks.world) if rank != ranks.rank}
    lost = time.monotonic()
    number = 0
    while not stopped.wait(beat):
        number += 1
        try:
            store.set(str(ranks.rank), str(number))
            for rank, (last, since) in list(heard.items()):
                said = store.get(str(rank)) if store.check([str(rank)]) else b""
                if said == b"done":
                    del heard[rank]
                elif said.startswith(b"failed"):
                    end(f"rank {rank} {said.decode(errors='replace')}")
                elif said != last:
                    heard[rank] = said, time.monotonic()
                elif time.monotonic() - since > dead_after:
                    end(f"rank {rank} has not been heard of for {dead_after:.0f} seconds: it or its machine died")
            lost = time.monotonic()
        except RuntimeError as error:
            if time.monotonic() - lost > dead_after:
                end(f"the rendezvous at rank 0's machine is gone ({' '.join(str(error).split())[:100]})")


def _end(why: str) -> None:
    """Leave at once: the main thread may be waiting for a rank that is no more."""
    rank = os.environ.get("RANK", "?")
    print(f"error: rank {rank} ends because {why}", file=sys.stderr, flush=True)
    os._exit(1)
