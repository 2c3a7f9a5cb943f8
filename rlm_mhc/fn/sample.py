"""Drawing the next token."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlm_mhc.fn.norm import widen


def sample_token(
    logits: Float[Tensor, "*b v"],
    generator: torch.Generator | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Int[Tensor, "*b"]:
    """One token per row from `softmax(logits / temperature)`, among the `top_k` most likely; 0 is the most likely one.

    Raises:
        ValueError: on a negative temperature or `top_k < 1`.

    >>> sample_token(torch.tensor([0.0, 5.0, 1.0]), temperature=0.0)
    tensor(1)
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature}: expected at least 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: expected at least 1, or None for all")
    if temperature == 0:
        return logits.argmax(-1)
    scaled = widen(logits) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        lowest = scaled.topk(top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < lowest, -torch.inf)
    drawn = torch.multinomial(scaled.softmax(-1).reshape(-1, logits.shape[-1]), 1, generator=generator)
    return drawn.view(logits.shape[:-1])
