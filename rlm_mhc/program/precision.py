"""Compute dtypes, and the loss scale that keeps fp16 gradients in range."""

from typing import NamedTuple

import torch
from torch import Tensor

COMPUTE_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INITIAL_SCALE = 2.0**16
# Gradients that need a larger scale are 0 in fp16 anyway, and fp32 holds the scaled loss.
SMALLEST_SCALE, LARGEST_SCALE = 1.0, 2.0**64
GROWTH_INTERVAL = 2000


class LossScale(NamedTuple):
    """`scale` multiplies the loss, 0-d fp32, from 1 to 2⁶⁴; `good_steps` counts updates since it last changed, 0-d
    int64."""

    scale: Tensor
    good_steps: Tensor


def init_loss_scale(precision: str, device: torch.device | str) -> LossScale | tuple[()]:
    """2¹⁶ for fp16; `()` for precisions whose range is that of fp32.

    >>> init_loss_scale("bf16", "cpu")
    ()
    """
    return make_loss_scale(INITIAL_SCALE, 0, device) if precision == "fp16" else ()


def make_loss_scale(scale: float, good_steps: int, device: torch.device | str) -> LossScale:
    """The loss scale of two numbers."""
    return LossScale(
        torch.tensor(scale, dtype=torch.float32, device=device),
        torch.tensor(good_steps, dtype=torch.int64, device=device),
    )


def restore_loss_scale(scale: float, good_steps: int, device: torch.device | str) -> LossScale:
    """The loss scale of a checkpoint, or a fresh one where its numbers are out of range: earlier versions let it fall
    to 0, from where no step updates.

    >>> restore_loss_scale(0.0, 0, "cpu").scale
    tensor(65536.)
    """
    if SMALLEST_SCALE <= scale <= LARGEST_SCALE and 0 <= good_steps < GROWTH_INTERVAL:
        return make_loss_scale(scale, good_steps, device)
    return make_loss_scale(INITIAL_SCALE, 0, device)


def next_loss_scale(loss_scale: LossScale, skipped: Tensor) -> LossScale:
    """Halve the scale after a step whose gradient was not finite, double it after 2000 good ones in a row; it stays
    between 1 and 2⁶⁴, also when it was not finite.

    Source: Micikevicius et al., arXiv 1710.03740; the constants of `torch.amp.GradScaler`, with backoff 0.5.

    >>> scale = init_loss_scale("fp16", "cpu")
    >>> next_loss_scale(scale, torch.tensor(1.0)).scale
    tensor(32768.)
    """
    bad, good = skipped > 0, loss_scale.good_steps + 1
    grown = ~bad & (good >= GROWTH_INTERVAL)
    scale = loss_scale.scale.nan_to_num(SMALLEST_SCALE)
    scale = torch.where(bad, scale / 2, torch.where(grown, scale * 2, scale))
    return LossScale(scale.clamp(SMALLEST_SCALE, LARGEST_SCALE), torch.where(bad | grown, 0, good))
