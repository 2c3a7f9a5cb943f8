"""Checkpoints written beside the training: the loop waits for a copy of the state, not for the disk."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch

from rlm_mhc.tree import size_bytes, tree_leaves, tree_map


class Writer:
    """A thread that runs one job at a time; on leaving the context, what is under way is finished.

    A job that fails by an `OSError` is told to `say`, and does not end the run; any other error does, at the next
    `submit` or `wait`.
    """

    def __init__(self, say: Callable[[str], object]) -> None:
        self.say = say
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.running: Future[OSError | None] | None = None

    def submit(self, job: Callable[[], object], what: str) -> None:
        """Start a job once the one before is done; `what` it is, in words."""
        self.wait()
        self.running = self.pool.submit(self._run, job, what)

    def wait(self) -> OSError | None:
        """Wait for the job under way; returns its failure."""
        return self.running.result() if self.running else None

    def _run(self, job: Callable[[], object], what: str) -> OSError | None:
        try:
            job()
        except OSError as error:
            self.say(f"{what} could not be written: {error}")
            return error
        return None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.pool.shutdown()


def snapshot(tree: Any) -> Any:
    """A copy of a tree that later updates in place do not touch: on the device it lies on, or where a CUDA device has
    no room for twice of it, on the CPU."""
    device = tree_leaves(tree)[0].device
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 2 * size_bytes(tree):
        return tree_map(lambda leaf: leaf.to("cpu"), tree)
    copy = tree_map(torch.clone, tree)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # the writer reads on a stream of its own
    return copy
