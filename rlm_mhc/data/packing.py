"""A stream of tokens as windows of `max_length + 1`, losing and repeating none."""

from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from rlm_mhc.types import IGNORED_TARGET

HELD_OUT_EVERY = 100


class Sequences(Protocol):
    """Sequences of one length by their number."""

    @property
    def total(self) -> int:
        """How many there are."""
        ...

    def inputs_and_targets(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Row `index` as int64 inputs and targets."""
        ...


Split = TypeVar("Split", bound=Any)


class PackedSequences(NamedTuple):
    """Overlapping windows on a token stream: window i is `tokens[i·length : (i+1)·length + 1]`.

    Neighbours share one token, the last target of the one and the first input of the other. So every token but the
    first is a target exactly once, and every token but the last an input exactly once. The last window is padded
    with targets that do not count.
    """

    tokens: np.ndarray
    length: int
    first: int
    total: int

    def inputs_and_targets(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Window `index` as int64 inputs and targets of `length`; the padding is token 0 with target -100.

        >>> PackedSequences(np.arange(6), 4, 0, 2).inputs_and_targets(1)
        (array([4, 0, 0, 0]), array([   5, -100, -100, -100]))
        """
        start = (self.first + index) * self.length
        window = np.asarray(self.tokens[start : start + self.length + 1], dtype=np.int64)
        return padded(window[:-1], window[1:], self.length)


def padded(inputs: np.ndarray, targets: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Both at that length, by token 0 and target -100 behind them: what attends to the past never sees that.

    >>> padded(np.array([3]), np.array([4]), 2)
    (array([3, 0]), array([   4, -100]))
    """
    missing = (0, length - len(inputs))
    return np.pad(inputs, missing), np.pad(targets, missing, constant_values=IGNORED_TARGET)


def windows(tokens: np.ndarray, length: int) -> PackedSequences:
    """All windows of a stream; a stream of fewer than two tokens has none.

    >>> windows(np.arange(9), 4).total
    2
    """
    return PackedSequences(tokens, length, 0, max(0, -(-(len(tokens) - 1) // length)))


def hold_out(whole: Split) -> tuple[Split, Split]:
    """Split off the last hundredth of the rows, at least one, for evaluation; with one row, nothing.

    >>> train, held_out = hold_out(windows(np.arange(41), 4))
    >>> train.total, held_out.first
    (9, 9)
    """
    size = max(1, round(whole.total / HELD_OUT_EVERY)) if whole.total > 1 else 0
    split = whole.total - size
    return whole._replace(total=split), whole._replace(first=whole.first + split, total=size)
