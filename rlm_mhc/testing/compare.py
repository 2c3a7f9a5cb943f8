"""Comparing trees of tensors, leaf by leaf, with the name of the leaf that differs."""

from typing import Any

import torch
from torch import Tensor

from rlm_mhc.tree import named_leaves

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def largest_difference(actual: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """`max |actual - expected|` relative to `scale`, by default the largest entry of `expected`."""
    if expected.numel() == 0:
        return 0.0
    wide = expected.double()
    scale = scale if scale is not None else wide.abs().max().item()
    return (actual.double() - wide).abs().max().item() / max(scale, torch.finfo(torch.float64).tiny)


def assert_trees_close(actual: Any, expected: Any, tolerance: float, floor: float = 0.0) -> None:
    """Same names and shapes, and every leaf within `tolerance` of its largest entry (at least `floor`).

    A floor is for leaves that are zero by symmetry and hold only rounding: give the size of their neighbours.

    Raises:
        AssertionError: naming the first leaf that differs, and by how much.
    """
    ours, theirs = named_leaves(actual), named_leaves(expected)
    assert ours.keys() == theirs.keys(), f"other names: {sorted(ours.keys() ^ theirs.keys())}"
    for name, leaf in ours.items():
        assert leaf.shape == theirs[name].shape, f"{name}: shape {tuple(leaf.shape)}, not {tuple(theirs[name].shape)}"
        if not leaf.numel():
            continue
        scale = max(theirs[name].abs().max().item(), floor)
        error = largest_difference(leaf, theirs[name], scale)
        assert error <= tolerance, f"{name}: differs by {error:.2e} of {scale:.2e}, allowed {tolerance:.0e}"
