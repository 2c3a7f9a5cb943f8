"""Rotary position embedding in Llama's layout."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlm_mhc.fn.norm import widen
from rlm_mhc.types import RotaryTable


def rotary_table(
    positions: Int[Tensor, "*t s"], head_dim: int, theta: float = 10000.0
) -> tuple[RotaryTable, RotaryTable]:
    """`(cos, sin)` of `position · theta^(-2i/d)`, each `[*t, s, d/2]`, fp32.

    Raises:
        ValueError: when `head_dim` is odd.

    >>> rotary_table(torch.arange(6), 8)[0].shape
    torch.Size([6, 4])
    """
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim}: rotary embedding turns pairs, so it must be even")
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.to(torch.float32).unsqueeze(-1) / theta**exponents
    return angles.cos(), angles.sin()


def rotary_embedding(x: Float[Tensor, "*b h s d"], cos: RotaryTable, sin: RotaryTable) -> Float[Tensor, "*b h s d"]:
    """Turn the pair `(x[i], x[i + d/2])` by the angle of its position, the same in all heads.

    The pairs are halves apart, as in transformers' Llama, not neighbours as in the paper.
    Source: Su et al., arXiv 2104.09864.

    >>> rotary_embedding(torch.tensor([[[1.0, 0.0]]]), *rotary_table(torch.tensor([0]), 2))
    tensor([[[1., 0.]]])
    """
    first, second = widen(x).chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
