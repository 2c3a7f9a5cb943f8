"""Learning rate as a function of the step."""

import math

import torch
from torch import Tensor

from rlm_mhc.types import Scalar


def cosine_schedule(
    step: int | Tensor, *, lr: float, warmup_steps: int, max_steps: int, min_lr_ratio: float = 0.1
) -> Scalar:
    """The rate of update number `step`, counted from 0: a linear warm-up, then a cosine.

    Update `warmup_steps - 1` has the full `lr`; the last one, `max_steps - 1`, and all after it have
    `min_lr_ratio · lr`. No update has rate 0 unless `min_lr_ratio` is 0.

    Source: Loshchilov & Hutter, arXiv 1608.03983.

    >>> [round(cosine_schedule(t, lr=1.0, warmup_steps=2, max_steps=4).item(), 3) for t in range(5)]
    [0.5, 1.0, 0.55, 0.1, 0.1]
    """
    if not isinstance(step, Tensor):
        step = torch.tensor(step, dtype=torch.float32, device="cpu")
    done = step.to(torch.float32) + 1
    warmup = done / max(warmup_steps, 1)
    progress = ((done - warmup_steps) / max(max_steps - warmup_steps, 1)).clamp(0, 1)
    cosine = min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + torch.cos(math.pi * progress))
    return lr * torch.where(done < warmup_steps, warmup, cosine)
