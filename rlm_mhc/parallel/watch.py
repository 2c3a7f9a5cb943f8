"""A watch over the other ranks: one that dies ends them all within a minute, instead of leaving them to wait."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial

import torch.distributed as dist

from rlm_mhc.parallel.ranks import Ranks

BEAT_SECONDS = 2.0
DEAD_AFTER_SECONDS = 25.0
# Until a rank is heard of for the first time: processes do not start at the same moment.
START_SECONDS = 120.0


@contextmanager
def watch_ranks(ranks: Ranks, *, dead_after: float = DEAD_AFTER_SECONDS, beat: float = BEAT_SECONDS) -> Iterator[None]:
    """Tell the other ranks every few seconds that this one lives, and end this process when one of them does not.

    A rank that leaves by an error says so, and what the error was; one that vanishes is noticed after `dead_after`
    seconds. Either way the last line on stderr names it. Beats go through the store of the rendezvous, in threads of
    their own, so that they go on while the rank computes or waits.
    """
    if ranks.world == 1:
        yield
        return
    assert ranks.connect is not None
    # A connection of its own: the other one waits for one answer at a time.
    store = dist.PrefixStore("watch", ranks.connect(timedelta(seconds=dead_after)))
    watch = Watch(store, ranks, dead_after, beat, partial(_end, ranks))
    watch.start()
    try:
        yield
    except BaseException as error:
        if _lost_a_peer(error):
            # Wait until the watch knows which rank died; torchrun reports that itself, and restarts sooner.
            watch.wait(3 * beat + (0 if "TORCHELASTIC_RUN_ID" in os.environ else dead_after))
        watch.stop(f"failed: {' '.join(str(error).split()) or type(error).__name__}")
        time.sleep(2 * beat)  # the store may live in this process: the others are to read that first
        raise
    watch.stop("done")


class Watch:
    """Two threads: one sends and reads beats, the other notices when the first one's store no longer answers."""

    def __init__(
        self, store: dist.Store, ranks: Ranks, dead_after: float, beat: float, end: Callable[[str], None]
    ) -> None:
        self.store, self.rank, self.dead_after, self.beat, self.end = store, ranks.rank, dead_after, beat, end
        now = time.monotonic()
        patience = START_SECONDS - dead_after
        self.heard = {rank: (b"", now + patience) for rank in range(ranks.world) if rank != ranks.rank}
        self.answered = now
        self.stopped = threading.Event()
        self.threads = [threading.Thread(target=f, daemon=True) for f in (self._beat, self._listen)]

    def start(self) -> None:
        """Begin."""
        for thread in self.threads:
            thread.start()

    def wait(self, seconds: float) -> None:
        """Let the watch go on for a while; it may end the process meanwhile."""
        self.stopped.wait(seconds)

    def stop(self, last_words: str) -> None:
        """End the watch, and tell the others why: `done`, or what failed."""
        self.stopped.set()
        for thread in self.threads:
            thread.join(2 * self.beat)
        sender = threading.Thread(target=self._tell, args=(last_words,), daemon=True)
        sender.start()
        sender.join(self.dead_after)  # a store that does not answer is not waited for

    def _tell(self, what: str) -> None:
        with suppress(RuntimeError):  # the store may have gone with the rank that held it
            self.store.set(str(self.rank), what)

    def _beat(self) -> None:
        number = 0
        while not self.stopped.wait(self.beat):
            number += 1
            with suppress(RuntimeError):
                self.store.set(str(self.rank), str(number))
                for rank in list(self.heard):
                    self._hear(rank, self.store.get(str(rank)) if self.store.check([str(rank)]) else b"")
                self.answered = time.monotonic()

    def _hear(self, rank: int, said: bytes) -> None:
        last, since = self.heard[rank]
        if said == b"done":
            del self.heard[rank]
        elif said.startswith(b"failed"):
            self.end(f"rank {rank} {said.decode(errors='replace')}")
        elif said != last:
            self.heard[rank] = said, time.monotonic()
        elif time.monotonic() - since > self.dead_after:
            self.end(f"rank {rank} has not been heard of for {self.dead_after:.0f} seconds: it or its machine died")

    def _listen(self) -> None:
        while not self.stopped.wait(self.beat):
            if time.monotonic() - self.answered > self.dead_after:
                self.end("the rendezvous no longer answers: rank 0 or its machine died")


def _lost_a_peer(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in ("gloo", "nccl", "peer"))


def _end(ranks: Ranks, why: str) -> None:
    """Leave at once: the main thread may be waiting for a rank that is no more."""
    print(f"error: rank {ranks.rank} ends because {why}", file=sys.stderr, flush=True)
    os._exit(1)
