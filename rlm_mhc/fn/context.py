"""Where the tokens of a sequence stand, and which of them a token may attend to."""

from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.layout import require_entries
from rlm_mhc.fn.rope import rotary_table
from rlm_mhc.types import RotaryTable, Tokens


class Context(NamedTuple):
    """Positions of the tokens `[*b, s]` that a block gets.

    - `cos`, `sin`: rotary table `[*b, s, d/2]`
    - `documents`: ids `[*b, s]`; a token attends to tokens with its own id; `()`: to all
    - `window`: a token attends to that many tokens, itself the last; 0: to all before it
    """

    cos: RotaryTable
    sin: RotaryTable
    documents: Tensor | tuple[()] = ()
    window: int = 0


def positions(tokens: Tokens, config: ModelConfig, *, documents: Tensor | tuple[()] = (), window: int = 0) -> Context:
    """Return the context of tokens at positions `0 … s-1`.

    Args:
        tokens: `[*b, s]` ids.
        config: the model's shape.
        documents: see `Context`.
        window: see `Context`.

    Raises:
        ValueError: when there is no token, the sequence is longer than `config.max_seq_len`, or documents are not ids
            of these tokens.

    >>> context = positions(torch.zeros(2, 3, dtype=torch.int64), ModelConfig.preset("tiny"))
    >>> context.cos.shape
    torch.Size([3, 16])
    """
    require_entries("tokens", tokens)
    length = tokens.shape[-1]
    if length > config.max_seq_len:
        raise ValueError(f"sequence of {length} tokens: longer than max_seq_len={config.max_seq_len} of the model")
    if isinstance(documents, Tensor) and documents.shape != tokens.shape:
        raise ValueError(f"documents {list(documents.shape)}: expected {list(tokens.shape)}, an id for each token")
    if window < 0:
        raise ValueError(f"window={window}: expected at least 0")
    at = torch.arange(length, dtype=torch.int64, device=tokens.device)
    return Context(*rotary_table(at, config.head_width, config.rope_theta), documents, window)


def attention_mask(context: Context) -> Bool[Tensor, "*b s s"] | None:
    """Return where a token may attend, `[query, key]`; None: everywhere up to itself.

    >>> table = torch.zeros(3, 1)
    >>> attention_mask(Context(table, table, documents=torch.tensor([0, 0, 1]))).int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [0, 0, 1]], dtype=torch.int32)
    """
    if isinstance(context.documents, tuple) and not context.window:
        return None
    at = torch.arange(context.cos.shape[-2], dtype=torch.int64, device=context.cos.device)
    query = at.unsqueeze(-1)
    mask = at <= query
    if context.window:
        mask = mask & (at > query - context.window)
    if isinstance(context.documents, Tensor):
        mask = mask & (context.documents.unsqueeze(-1) == context.documents.unsqueeze(-2))
    return mask
