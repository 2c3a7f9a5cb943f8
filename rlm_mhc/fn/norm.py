"""Root-mean-square normalisation, and the one rule for computing statistics in a wide enough dtype."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from rlm_mhc.fn.replaceable import replaceable
from rlm_mhc.params import RMSNorm
from rlm_mhc.types import Activations, Vector


def widen(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`x` in fp32, or in fp64 if it is fp64: the dtype of statistics, mappings and losses.

    >>> widen(torch.ones(1, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


@replaceable(1)
def norm(params: RMSNorm, x: Activations, run: Callable[[Tensor, Tensor], Tensor]) -> Activations:
    """`run(x, weight)`; or `params(x)`, see `replaceable`.

    >>> norm(RMSNorm(torch.ones(2)), torch.tensor([3.0, 4.0]), rms_norm)
    tensor([0.8485, 1.1314])
    """
    return run(x, params.weight)


def rms_norm(x: Activations, weight: Vector, eps: float = 1e-6) -> Activations:
    """`weight · x / sqrt(mean(x²) + eps)` over the last axis; the statistics in fp32 or wider, the result as `x`.

    Source: Zhang & Sennrich, arXiv 1910.07467; Llama's layout.

    >>> rms_norm(torch.tensor([3.0, 4.0]), torch.ones(2))
    tensor([0.8485, 1.1314])
    """
    wide = widen(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype)
