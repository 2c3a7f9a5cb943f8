"""Batches in an order that is a function of `(seed, epoch)`: the loader's whole position is three integers."""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from rlm_mhc.data.packing import Sequences
from rlm_mhc.fn import Batch


class Position(NamedTuple):
    """Where the loader is: the next sequence is number `offset` of the permutation of `(seed, epoch)`."""

    seed: int
    epoch: int = 0
    offset: int = 0


def next_batch(
    data: Sequences, position: Position, size: int, *, shuffle: bool = True, rank: int = 0, world: int = 1
) -> tuple[Batch, Position]:
    """A rank's `size` of the `size · world` sequences from a position on, and the position after all of them.

    Within an epoch every row is drawn once; a batch may straddle epochs. The ranks' parts are disjoint and
    together what one rank would draw.

    Raises:
        ValueError: when there is no row, or the position lies outside the data.

    >>> from rlm_mhc.data.packing import windows
    >>> batch, position = next_batch(windows(np.arange(41), 4), Position(seed=0, offset=8), 4)
    >>> batch.tokens.shape, position
    (torch.Size([4, 4]), Position(seed=0, epoch=1, offset=2))
    """
    if data.total < 1:
        raise ValueError("the data holds fewer than two tokens, so there is nothing to predict")
    if not 0 <= position.offset < data.total:
        raise ValueError(f"{position}: outside the data, which holds {data.total} rows")
    rows = []
    seed, epoch, offset = position
    for _ in range(size * world):
        rows.append(int(_order(seed, epoch, data.total)[offset]) if shuffle else offset)
        offset += 1
        if offset == data.total:
            epoch, offset = epoch + 1, 0
    return _batch(data, rows[rank * size : (rank + 1) * size]), Position(seed, epoch, offset)


def eval_batches(data: Sequences, size: int, limit: int) -> Iterator[Batch]:
    """The same at most `limit` batches every time, spread evenly over the data."""
    chosen = np.unique(np.linspace(0, data.total - 1, min(data.total, size * limit)).round().astype(int))
    for start in range(0, len(chosen), size):
        yield _batch(data, chosen[start : start + size].tolist())


def _batch(data: Sequences, rows: list[int]) -> Batch:
    pairs = [data.inputs_and_targets(row) for row in rows]
    tokens, targets = (torch.from_numpy(np.stack(column)) for column in zip(*pairs, strict=True))
    return Batch(tokens, targets)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(count)
