"""The ranks of a run under torchrun, and the one reduction that data parallelism needs."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
RENDEZVOUS_TIMEOUT = timedelta(minutes=2)
# Long enough for one rank to tokenize, evaluate or save while others wait; a dead rank is noticed by the watch.
COLLECTIVE_TIMEOUT = timedelta(hours=2)


class Ranks(NamedTuple):
    """This process is number `rank` of `world`, and number `local` on its machine; alone it is 0 of 1.

    `store` is where the ranks leave one another messages.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    store: dist.Store | None = None

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that writes and prints."""
        return self.rank == 0


ALONE = Ranks()


def find_ranks() -> Ranks:
    """Who torchrun says this process is, met at its rendezvous; alone, nothing is started.

    Raises:
        ValueError: where the environment names several processes but not which of them this is, or where they do not
            all come within two minutes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks()
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE={world} but no {', '.join(missing)}: start several processes with torchrun")
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
    except RuntimeError as error:
        raise ValueError(f"the {world} ranks did not meet within {RENDEZVOUS_TIMEOUT}: {error}") from None
    return Ranks(rank, world, int(os.environ["LOCAL_RANK"]), store)


@contextmanager
def process_group(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """The group that collectives run in: nccl on CUDA, gloo on the CPU; for one rank none."""
    if ranks.world == 1:
        yield
        return
    assert ranks.store is not None
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = dist.PrefixStore("rlm_mhc/group", ranks.store)
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=COLLECTIVE_TIMEOUT)
    yield
    dist.destroy_process_group()


class Pending(NamedTuple):
    """A vector that is being summed over the ranks, in place."""

    vector: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        """The sum."""
        self.work.wait()
        return self.vector


def all_reduce(vector: Tensor) -> Pending:
    """Begin to sum a vector over all ranks: the `reduce` of `make_train_step` for data parallelism.

    The sum takes the place of the vector, and is there once `wait()` returned it. On CUDA it runs on a stream of its
    own, on the CPU in a thread of its own, beside the backward of earlier layers.
    """
    work = dist.all_reduce(vector, async_op=True)
    assert work is not None
    return Pending(vector, work)


def sum_over_ranks(values: Tensor, ranks: Ranks) -> Tensor:
    """A tensor summed over the ranks, now."""
    return all_reduce(values.clone()).wait() if ranks.world > 1 else values


class Vote:
    """A sum over the ranks of small numbers on the CPU that no rank waits for: what it gives in one step is what the
    ranks said in the step before. Alone, it is what was said."""

    def __init__(self, ranks: Ranks) -> None:
        # A group of its own: on CUDA the other one's sums are in the order of the device's work.
        self.group = dist.new_group(backend="gloo") if ranks.world > 1 else None
        self.begun: Pending | None = None

    def exchange(self, said: Tensor) -> Tensor:
        """Say something, to be called as often by every rank; returns the sum of what all said at the last call, the
        same on every rank, at first zeros."""
        if self.group is None:
            return said
        before = self.begun.wait() if self.begun else torch.zeros_like(said)
        work = dist.all_reduce(said, group=self.group, async_op=True)
        assert work is not None
        self.begun = Pending(said, work)
        return before

    def close(self) -> None:
        """Wait for what is under way."""
        if self.begun:
            self.begun.wait()
            self.begun = None


def gather(ranks: Ranks, value: T) -> list[T]:
    """Every rank's value, on all of them; it must be picklable."""
    if ranks.world == 1:
        return [value]
    gathered: list[Any] = [None] * ranks.world
    dist.all_gather_object(gathered, value)
    return gathered


def from_first(ranks: Ranks, compute: Callable[[], T]) -> T:
    """What `compute()` gives on the first rank, on all of them; it must be picklable."""
    if ranks.world == 1:
        return compute()
    box = [compute() if ranks.is_first else None]
    dist.broadcast_object_list(box, 0)
    return box[0]  # type: ignore[return-value]


@contextmanager
def first_before_others(ranks: Ranks) -> Iterator[None]:
    """The body runs on the first rank alone, then on the first of each machine, then on the others: they find what
    was left on disk, whether the machines share one or not."""
    turn = 0 if ranks.is_first else 1 if ranks.local == 0 else 2
    for _ in range(turn if ranks.world > 1 else 0):
        dist.barrier()
    yield
    for _ in range(2 - turn if ranks.world > 1 else 0):
        dist.barrier()
