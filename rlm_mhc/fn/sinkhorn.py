"""Sinkhorn-Knopp: from any logits to a doubly stochastic matrix, with the gradient of its finite iteration."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rlm_mhc.fn.norm import widen
from rlm_mhc.fn.transforms import in_forward_mode
from rlm_mhc.types import StreamMatrix

# Of the outcomes that a backward computes again, those of so many matrices exist at once: at most `TAPE` times the
# logits altogether, or `FEWEST` matrices.
TAPE, FEWEST = 4, 256


def sinkhorn_knopp(
    logits: StreamMatrix, *, num_iters: int = 20, tolerance: float | None = None, eps: float = 0.0
) -> StreamMatrix:
    """Start from `exp(logits)`, then `num_iters` times: divide columns by their sums, then rows by theirs.

    Rows come last, so row sums are 1 to rounding; what the iteration leaves over is in the column sums.
    It runs on logarithms, hence the result and its gradient are finite for any finite logits. Logits beyond a
    quarter of the largest number of their dtype count as that quarter.

    The gradient is that of these iterations, not of their limit. It keeps the logits alone and computes the iterates
    again, so that memory does not grow with `num_iters`; `vmap`, `jvp` and second derivatives work as of any
    function. Under `torch.compile` the compiler sees the plain loop and decides itself what to keep.

    Args:
        logits: `[*b, n, n]`, any float dtype; any `n ≥ 1`, any batch shape, also empty.
        num_iters: pairs of normalisations, `≥ 1`; with a tolerance the most there may be.
        tolerance: stop as soon as all column sums of all matrices are so near to 1. How many iterations that takes
            depends on the data, so neither `vmap` nor `torch.compile` takes it.
        eps: added to the entries after the first columns and to every sum after that, as DeepSeek-V4 does; row sums
            are then 1 up to about `eps`.

    Returns:
        `[*b, n, n]`, fp32 (fp64 for fp64 logits), non-negative.

    Raises:
        ValueError: on fewer than one iteration, or a negative `eps` or `tolerance`.

    Source: arXiv 2512.24880, section 4.2; Sinkhorn & Knopp, 1967.

    >>> sinkhorn_knopp(torch.tensor([[0.0, 3e4], [-3e4, 1.0]])).sum(-1)
    tensor([1., 1.])
    """
    if num_iters < 1:
        raise ValueError(f"num_iters={num_iters}: expected at least 1")
    if eps < 0 or (tolerance is not None and tolerance < 0):
        raise ValueError(f"eps={eps}, tolerance={tolerance}: expected no negative number")
    wide = widen(logits)
    if tolerance is not None:
        num_iters = _iterations_until(wide.detach(), tolerance, num_iters, eps)
    if torch.compiler.is_compiling():
        return _tokens_first(_iterate(_tokens_last(wide), num_iters, eps))
    return _Sinkhorn.apply(wide, num_iters, eps)


def sinkhorn_implicit(logits: StreamMatrix, *, num_iters: int = 100) -> StreamMatrix:
    """`sinkhorn_knopp(logits)` with the gradient of its limit, by implicit differentiation.

    At the limit `P`, with `G = cotangent · P`, the cotangent of the logits is `G - P · (u 1ᵀ + 1 vᵀ)` where
    `u + P v` and `Pᵀ u + v` are the row and column sums of `G`. It costs one solve of size n whatever `num_iters`.

    **Its error**: the result is taken for the limit. Where the columns are off by δ, the gradient differs from that
    of the limit by about `δ · |cotangent| / (1 - σ)²`, σ the second singular value of `P`. That vanishes with enough
    iterations, and is large where `P` is near a permutation (σ near 1) and the iteration has not converged: there
    use `sinkhorn_knopp`, whose gradient is exact for any number of iterations.

    Args:
        logits: as in `sinkhorn_knopp`.
        num_iters: pairs of normalisations.

    Raises:
        ValueError: on fewer than one iteration.
        RuntimeError: in forward mode under `torch.compile`.

    Source: Luise et al., arXiv 1805.11897.

    >>> sinkhorn_implicit(torch.zeros(2, 2))
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    if num_iters < 1:
        raise ValueError(f"num_iters={num_iters}: expected at least 1")
    if torch.compiler.is_compiling() and in_forward_mode():
        # Dynamo would trace the forward and differentiate the iterations.
        raise RuntimeError("sinkhorn_implicit in forward mode: not under torch.compile; use sinkhorn_knopp")
    return _AtTheLimit.apply(widen(logits), num_iters)


def _tokens_last(x: Tensor) -> Tensor:
    """`[*b, n, n]` to `[n, n, *b]`: normalising over tiny leading axes is a few vectorised operations."""
    return x.movedim((-2, -1), (0, 1)).contiguous()


def _tokens_first(x: Tensor) -> Tensor:
    return x.movedim((0, 1), (-2, -1))


def _outcomes(logits: Tensor, num_iters: int, eps: float) -> Iterator[tuple[Tensor, int, Tensor | None]]:
    """Each normalisation of `logits [n, n, *b]`: its result, its axis, and where `eps` was added to it, the sum."""
    log = _bounded(logits)
    if not eps:
        for _ in range(num_iters):
            for axis in (0, 1):
                log = torch.log_softmax(log, dim=axis)
                yield log.exp(), axis, None
        return
    start = torch.softmax(log, dim=0)
    m = start + eps
    yield start, 0, m
    for number in range(2 * num_iters - 1):
        axis = (number + 1) % 2
        m = m / (m.sum(axis, keepdim=True) + eps)
        yield m, axis, None


def _iterate(logits: Tensor, num_iters: int, eps: float) -> Tensor:
    """The last of the outcomes, without the numbers of those before it where logarithms suffice."""
    if eps:
        for m, _, _ in _outcomes(logits, num_iters, eps):
            last = m
        return last
    log = _bounded(logits)
    for _ in range(num_iters):
        log = torch.log_softmax(torch.log_softmax(log, dim=0), dim=1)
    return log.exp()


def _iterations_until(logits: Tensor, tolerance: float, most: int, eps: float) -> int:
    after_rows = (m for m, axis, _ in _outcomes(_tokens_last(logits), most, eps) if axis == 1)
    for number, m in enumerate(after_rows, 1):
        if not m.numel() or (m.sum(0) - 1).abs().max() <= tolerance:
            return number
    return most


def _pull(logits: Tensor, cotangent: Tensor, num_iters: int, eps: float) -> Tensor:
    """The cotangent of `logits [n, n, tokens]`: `g ← g - m · Σ g` for each outcome `m` along its axis, from the last.

    `g` begins as `cotangent · m`, the cotangent of the last logarithm.
    """
    tape = list(_outcomes(logits, num_iters, eps))
    g = cotangent * tape[-1][0]
    for m, axis, shifted in reversed(tape):
        if shifted is not None:
            g = g * (m / shifted)
        g = g - m * g.sum(axis, keepdim=True)
    return _within_limits(logits, g)


def _limit(logits: Tensor) -> float:
    return torch.finfo(logits.dtype).max / 4


def _bounded(logits: Tensor) -> Tensor:
    return logits.clamp(-_limit(logits), _limit(logits))


def _within_limits(logits: Tensor, g: Tensor) -> Tensor:
    return torch.where(logits.abs() > _limit(logits), 0.0, g)


def _for_all_levels(jvp: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make `jvp(ctx, tangent, *saved)` differentiable by the forward-mode levels around it.

    PyTorch runs the jvp of a Function with forward mode off at all levels, which would make a jvp of it zero. With it
    on, saved tensors must not have the tangents of this level.
    """

    def differentiable(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        with forward_ad._set_fwd_grad_enabled(True):
            return jvp(ctx, tangent, *(forward_ad.unpack_dual(x).primal for x in ctx.saved_tensors))

    return differentiable


class _Sinkhorn(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, num_iters: int, eps: float) -> Tensor:
        return _tokens_first(_iterate(_tokens_last(logits), num_iters, eps))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, ctx.num_iters, ctx.eps = inputs
        ctx.save_for_backward(logits)
        ctx.save_for_forward(logits)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        n = logits.shape[-1]
        tokens = logits.numel() // (n * n)
        flat = (_tokens_last(x).reshape(n, n, tokens) for x in (logits, cotangents[0]))
        size = max(FEWEST, TAPE * tokens // (2 * ctx.num_iters))
        pieces = zip(*(x.split(size, -1) for x in flat), strict=True)
        g = torch.cat([_pull(x, g, ctx.num_iters, ctx.eps) for x, g in pieces], -1)
        return _tokens_first(g.reshape(n, n, *logits.shape[:-2])), None, None

    @staticmethod
    @_for_all_levels
    def jvp(ctx: Any, tangent: Tensor, logits: Tensor) -> Tensor:
        logits = _tokens_last(logits)
        t = _within_limits(logits, _tokens_last(tangent))
        for m, axis, shifted in _outcomes(logits, ctx.num_iters, ctx.eps):
            t = t - (m * t).sum(axis, keepdim=True)
            if shifted is not None:
                t = t * (m / shifted)
        return _tokens_first(m * t)


class _AtTheLimit(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, num_iters: int) -> Tensor:
        return _tokens_first(_iterate(_tokens_last(logits), num_iters, 0.0))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        logits, p = ctx.saved_tensors
        return _within_limits(logits, _without_sums(p, cotangents[0] * p)), None

    @staticmethod
    @_for_all_levels
    def jvp(ctx: Any, tangent: Tensor, logits: Tensor, p: Tensor) -> Tensor:
        return _without_sums(p, p * _within_limits(logits, tangent))


def _without_sums(p: Tensor, g: Tensor) -> Tensor:
    """`g - p · (u 1ᵀ + 1 vᵀ)` with the `u`, `v` that leave no row or column sum; it is its own transpose."""
    n, eps = p.shape[-1], torch.finfo(p.dtype).eps
    wide, wide_g = p.double(), g.double()  # autocast leaves fp64 alone
    rows, columns = wide_g.sum(-1, keepdim=True), wide_g.sum(-2).unsqueeze(-1)
    # u and v are known up to a constant between them: 11ᵀ/n fixes it. The rest is for a permutation, where pᵀp = 1.
    identity = torch.eye(n, dtype=torch.float64, device=p.device)
    # Not solve: its second derivative in forward mode is wrong (torch 2.13).
    v = torch.linalg.inv(identity * (1 + 4 * n * eps) + 1 / n - wide.mT @ wide) @ (columns - wide.mT @ rows)
    u = rows - wide @ v
    return (wide_g - wide * (u + v.mT)).to(g.dtype)
