"""Comparing trees of tensors, leaf by leaf, with the name of the leaf that differs."""

from typing import Any

import torch
from torch import Tensor

from rlm_mhc.tree import named_leaves

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}

# Either of two summation orders may be more accurate by chance, most in leaves of few entries: with FACTOR and
# ROUNDINGS the worst of 2,500 random models uses 0.8 of what is allowed. Half precision is summed in float32.
FACTOR, SHARE = 4.0, 1e-2
ROUNDINGS = {torch.float64: 32, torch.float32: 32, torch.bfloat16: 2, torch.float16: 2}


def largest_difference(actual: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """`max |actual - expected|` relative to `scale`, by default the largest entry of `expected`."""
    if expected.numel() == 0:
        return 0.0
    wide = expected.double()
    scale = scale if scale is not None else wide.abs().max().item()
    return (actual.double() - wide).abs().max().item() / max(scale, torch.finfo(torch.float64).tiny)


def _leaves(tree: Any, like: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return both trees' leaves by name; check names, shapes and integers."""
    ours, theirs = named_leaves(tree), named_leaves(like)
    assert ours.keys() == theirs.keys(), f"other names: {sorted(ours.keys() ^ theirs.keys())}"
    for name, leaf in ours.items():
        assert leaf.shape == theirs[name].shape, f"{name}: shape {tuple(leaf.shape)}, not {tuple(theirs[name].shape)}"
        assert leaf.is_floating_point() or torch.equal(leaf, theirs[name]), f"{name}: other integers"
    return ours, theirs


def assert_trees_close(actual: Any, expected: Any, tolerance: float, floor: float = 0.0) -> None:
    """Same names and shapes, and every leaf within `tolerance` of its largest entry (at least `floor`).

    A floor is for leaves that are zero by symmetry and hold only rounding: give the size of their neighbours.
    Results in float32 or lower depend on the CPU: compare them with `assert_as_accurate`.

    Raises:
        AssertionError: naming the first leaf that differs, and by how much.
    """
    ours, theirs = _leaves(actual, expected)
    for name, leaf in ours.items():
        if not leaf.numel():
            continue
        scale = max(theirs[name].abs().max().item(), floor)
        error = largest_difference(leaf, theirs[name], scale)
        assert error <= tolerance, f"{name}: differs by {error:.2e} of {scale:.2e}, allowed {tolerance:.0e}"


def assert_as_accurate(actual: Any, plain: Any, exact: Any, factor: float = FACTOR, floor: float = 0.0) -> None:
    """Check that the rounding error of `actual` is at most `factor` times that of `plain`, leaf by leaf.

        max|actual - exact| <= factor * max(max|plain - exact|, ROUNDINGS[dtype] * eps * scale)

    No constant bounds float32 on every CPU: vector width and number of threads change the order of sums. So `plain` is
    a straightforward computation (plain autograd, say) in the same dtype on the same machine, and `exact` is the same
    in float64. `dtype` is the coarsest of `plain`, `eps` its machine epsilon. `scale` is the largest entry of the leaf
    in `exact`, at least SHARE times the largest of the tree: gradients that are zero by symmetry hold the rounding of
    larger ones; and at least `floor`, for numbers that are differences of known larger ones. `plain` itself must be
    within `eps ** (1 / 3)` of `scale`, or an error that both make would pass.

    Raises:
        AssertionError: naming the first leaf that differs, and by how much.

    Example:
        >>> x = torch.linspace(0, 1, 7)
        >>> plain, exact = x.exp(), x.double().exp()
        >>> assert_as_accurate({"exp": exact.float()}, {"exp": plain}, {"exp": exact})
        >>> assert_as_accurate({"exp": exact.float() + 1e-4}, {"exp": plain}, {"exp": exact})
        Traceback (most recent call last):
        AssertionError: exp: differs by 1.00e-04, allowed 4.15e-05
    """
    ours, theirs = _leaves(actual, exact)
    simple, _ = _leaves(plain, exact)
    largest = {
        name: leaf.abs().max().item() for name, leaf in theirs.items() if leaf.numel() and leaf.is_floating_point()
    }
    dtypes = {simple[name].dtype for name in largest}
    eps, dtype = max(((torch.finfo(dtype).eps, dtype) for dtype in dtypes), default=(0.0, torch.float64))
    for name, own in largest.items():
        scale = max(own, SHARE * max(largest.values()), floor)
        error, usual = (largest_difference(x[name], theirs[name], 1.0) for x in (ours, simple))
        assert usual <= eps ** (1 / 3) * scale, f"{name}: plain itself differs by {usual:.2e} of {scale:.2e}"
        # The rounding of `exact`, which is all that a plain computation in float64 differs from it by, is not measured.
        allowed = max(factor * max(usual, ROUNDINGS[dtype] * eps * scale), TOLERANCE[torch.float64] * scale)
        assert error <= allowed, f"{name}: differs by {error:.2e}, allowed {allowed:.2e}"
