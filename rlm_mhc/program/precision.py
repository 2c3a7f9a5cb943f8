"""Compute dtypes, and the loss scale that keeps fp16 gradients in range."""

from typing import NamedTuple

import torch
from torch import Tensor

COMPUTE_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 2000


class LossScale(NamedTuple):
    """`scale` multiplies the loss, 0-d fp32; `good_steps` counts updates since it last changed, 0-d int64."""

    scale: Tensor
    good_steps: Tensor


def init_loss_scale(precision: str, device: torch.device | str) -> LossScale | tuple[()]:
    """2¹⁶ for fp16; `()` for precisions whose range is that of fp32.

    >>> init_loss_scale("bf16", "cpu")
    ()
    """
    if precision != "fp16":
        return ()
    return LossScale(torch.tensor(INITIAL_SCALE, device=device), torch.tensor(0, device=device))


def next_loss_scale(loss_scale: LossScale, skipped: Tensor) -> LossScale:
    """Halved after a step whose gradient was not finite, doubled after 2000 good ones in a row.

    Source: Micikevicius et al., arXiv 1710.03740; the constants of `torch.amp.GradScaler`, with backoff 0.5.

    >>> scale = init_loss_scale("fp16", "cpu")
    >>> next_loss_scale(scale, torch.tensor(1.0)).scale
    tensor(32768.)
    """
    good = torch.where(skipped > 0, 0, loss_scale.good_steps + 1)
    grown = good >= GROWTH_INTERVAL
    factor = torch.where(skipped > 0, 0.5, torch.where(grown, 2.0, 1.0))
    return LossScale(loss_scale.scale * factor, torch.where(grown, 0, good))
