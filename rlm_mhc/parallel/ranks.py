"""The ranks of a run under torchrun or srun, and the one reduction that data parallelism needs."""

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rlm_mhc.parallel.launch import Launch, read_launch

T = TypeVar("T")
RENDEZVOUS_TIMEOUT = timedelta(minutes=2)
# Long enough for one rank to tokenize, evaluate or save while others wait; a dead rank is noticed by the watch.
COLLECTIVE_TIMEOUT = timedelta(hours=2)
SECONDS_BETWEEN_LOOKS = 0.1


class Ranks(NamedTuple):
    """This process is number `rank` of `world`, and number `local` on its machine; alone it is 0 of 1.

    The ranks exchange messages in `store`; `connect(timeout)` opens another connection to it.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    store: dist.Store | None = None
    connect: Callable[[timedelta], dist.Store] | None = None

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that writes and prints."""
        return self.rank == 0


ALONE = Ranks()


def find_ranks() -> Ranks:
    """Meet the other ranks at the rendezvous that the environment names; alone, start nothing.

    The store of an elastic restart still holds the messages of earlier attempts, so keys get a prefix that the ranks
    agree on here and that no earlier attempt used.

    Raises:
        ValueError: as `read_launch` does; when the ranks do not all come within two minutes.
    """
    launch = read_launch()
    if launch.world == 1:
        return ALONE
    try:
        store, rank, world = next(dist.rendezvous(_url(launch), timeout=RENDEZVOUS_TIMEOUT))
        attempt = f"rlm_mhc/{name_attempt(store, rank, world, RENDEZVOUS_TIMEOUT)}"
    except RuntimeError as error:
        raise ValueError(_rendezvous_error(launch, error)) from None
    return Ranks(rank, world, launch.local, dist.PrefixStore(attempt, store), partial(_connect, launch, attempt))


def name_attempt(store: dist.Store, rank: int, world: int, timeout: timedelta) -> str:
    """Return a new name that all ranks that call this now agree on, whatever earlier calls left in the store.

    Rank 0 draws the name and confirms the nonce that each other rank drew for itself. A name of an earlier attempt is
    confirmed for the signs of that attempt only. `TORCHELASTIC_RESTART_COUNT` would not do: where one machine of
    several fails, it counts there alone.

    Raises:
        RuntimeError: when a rank does not come within `timeout`.
    """
    nonce = uuid.uuid4().hex
    if rank == 0:
        store.set("rlm_mhc/attempt", nonce)
        store.wait([f"{nonce}/{other}" for other in range(1, world)], timeout)
        store.set(f"{nonce}/all", " ".join(store.get(f"{nonce}/{other}").decode() for other in range(1, world)))
        return nonce
    store.wait(["rlm_mhc/attempt"], timeout)
    end = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        name = store.get("rlm_mhc/attempt").decode()
        store.set(f"{name}/{rank}", nonce)
        if store.check([f"{name}/all"]) and nonce in store.get(f"{name}/all").decode().split():
            return name
        time.sleep(SECONDS_BETWEEN_LOOKS)
    raise RuntimeError("another rank did not come")


def _url(launch: Launch) -> str:
    return f"tcp://{_host(launch)}:{launch.port}?rank={launch.rank}&world_size={launch.world}"


def _host(launch: Launch) -> str:
    return f"[{launch.address}]" if ":" in launch.address else launch.address


def _connect(launch: Launch, attempt: str, timeout: timedelta) -> dist.Store:
    return dist.PrefixStore(attempt, dist.TCPStore(launch.address, launch.port, timeout=timeout))


def _rendezvous_error(launch: Launch, error: RuntimeError) -> str:
    """Say what to do about ranks that did not meet."""
    reason = " ".join(str(error).split())[:200]
    remedy = (
        "start every task with srun, or this one alone with srun --ntasks=1; rank 0 must be on the first host of the "
        "node list, else set MASTER_ADDR; where the port is taken, set MASTER_PORT"
        if launch.starter == "srun"
        else "start every rank with torchrun, and let each reach MASTER_ADDR and MASTER_PORT"
    )
    return (
        f"the {launch.world} ranks did not meet at {_host(launch)}:{launch.port} within {RENDEZVOUS_TIMEOUT}: "
        f"{reason}; {remedy}"
    )


@contextmanager
def process_group(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """The group that collectives run in: nccl on CUDA, gloo on the CPU; for one rank none."""
    if ranks.world == 1:
        yield
        return
    assert ranks.store is not None
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = dist.PrefixStore("group", ranks.store)
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


class DelayedFlags:
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
