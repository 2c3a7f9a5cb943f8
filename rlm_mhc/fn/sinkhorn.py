"""Sinkhorn-Knopp: from any logits to a doubly stochastic matrix."""

import torch

from rlm_mhc.fn.norm import widen
from rlm_mhc.types import StreamMatrix


def sinkhorn_knopp(logits: StreamMatrix, *, num_iters: int = 20) -> StreamMatrix:
    """Start from `exp(logits)`, then `num_iters` times: divide columns by their sums, then rows by theirs.

    Rows come last, so row sums are 1 to rounding; what the iteration leaves over is in the column sums.
    It runs on logarithms, hence the result and its gradient are finite for any finite logits. Logits beyond a
    quarter of the largest number of their dtype count as that quarter.

    Args:
        logits: `[*b, n, n]`, any float dtype; any `n ≥ 1`, any batch shape, also empty.
        num_iters: pairs of normalisations, `≥ 1`.

    Returns:
        `[*b, n, n]`, fp32 (fp64 for fp64 logits), non-negative.

    Source: arXiv 2512.24880, section 4.2; Sinkhorn & Knopp, 1967.

    >>> sinkhorn_knopp(torch.tensor([[0.0, 3e4], [-3e4, 1.0]])).sum(-1)
    tensor([1., 1.])
    """
    if num_iters < 1:
        raise ValueError(f"num_iters={num_iters}: expected at least 1")
    wide = widen(logits)
    limit = torch.finfo(wide.dtype).max / 4
    # The tiny axes go first: normalising over them is then a few vectorised operations along the batch.
    log = wide.clamp(-limit, limit).movedim((-2, -1), (0, 1)).contiguous()
    for _ in range(num_iters):
        log = torch.log_softmax(log, dim=0)
        log = torch.log_softmax(log, dim=1)
    return log.exp().movedim((0, 1), (-2, -1))
