"""The language model: embedding, blocks, head."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.block import block
from rlm_mhc.fn.kernels import REFERENCE, Kernels
from rlm_mhc.fn.mhc import collapse_streams, expand_streams
from rlm_mhc.fn.rope import rotary_table
from rlm_mhc.params import LMParams
from rlm_mhc.types import Logits, RotaryTable, Tokens


class Backbone(NamedTuple):
    """What the blocks give: streams `[*b, s, n, c]` (without mHC `[*b, s, c]`) and, in the order in which the
    sub-layers run, their residual mappings, each `[*b, s, n, n]`."""

    hidden: Tensor
    res: tuple[Tensor, ...]


def forward(params: LMParams, tokens: Tokens, config: ModelConfig, kernels: Kernels = REFERENCE) -> Logits:
    """Logits `[*b, s, v]` of the token after each position.

    Args:
        params: the tree of `fn.init`.
        tokens: `[*b, s]` ids in `[0, vocab_size)`, `s ≤ max_seq_len`.
        config: its shape.
        kernels: the operations to run it with.

    Raises:
        ValueError: when the sequence is longer than `config.max_seq_len`.

    >>> from rlm_mhc import fn
    >>> config = ModelConfig.preset("tiny")
    >>> fn.forward(fn.init(config), torch.tensor([[1, 2, 3]]), config).shape
    torch.Size([1, 3, 4096])
    """
    return head(params, backbone(params, tokens, config, kernels).hidden, config, kernels)


def backbone(params: LMParams, tokens: Tokens, config: ModelConfig, kernels: Kernels = REFERENCE) -> Backbone:
    """Everything but the head; see `forward`."""
    cos, sin = positions(tokens, config)
    hidden = embed(params, tokens, config)
    res: tuple[Tensor, ...] = ()
    for layer in params.layers:
        hidden, layer_res = block(layer, hidden, cos, sin, config, kernels)
        res += layer_res
    return Backbone(hidden, res)


def positions(tokens: Tokens, config: ModelConfig) -> tuple[RotaryTable, RotaryTable]:
    """The rotary table for the tokens' positions `0 … s-1`.

    Raises:
        ValueError: when the sequence is longer than `config.max_seq_len`.
    """
    length = tokens.shape[-1]
    if length > config.max_seq_len:
        raise ValueError(f"sequence of {length} tokens: longer than max_seq_len={config.max_seq_len} of the model")
    return rotary_table(torch.arange(length, device=tokens.device), config.head_width, config.rope_theta)


def embed(params: LMParams, tokens: Tokens, config: ModelConfig) -> Tensor:
    """The embedding of each token, repeated as `mhc_flows` equal streams where mHC is on; see `require_kind`."""
    require_kind(params, config)
    x = F.embedding(tokens, params.embed_tokens.weight)
    return expand_streams(x, config.mhc_flows) if config.mhc_enabled else x


def require_kind(params: LMParams, config: ModelConfig) -> None:
    """Refuse parameters with mHC weights for a config without mHC, and the other way round.

    Raises:
        ValueError: saying so.
    """
    if params.layers and bool(params.layers[0].attn_mhc) != config.mhc_enabled:
        raise ValueError(f"mhc_enabled={config.mhc_enabled}: the parameters are those of the opposite")


def head(params: LMParams, hidden: Tensor, config: ModelConfig, kernels: Kernels = REFERENCE) -> Logits:
    """Average the streams, normalise, project onto the vocabulary (the embedding itself when tied)."""
    x: Float[Tensor, "*b s c"] = collapse_streams(hidden) if config.mhc_enabled else hidden
    x = kernels.rms_norm(x, params.norm.weight, config.norm_eps)
    weight = params.lm_head.weight if params.lm_head else params.embed_tokens.weight
    return F.linear(x, weight)
