"""The language model: embedding, blocks, head."""

from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.block import block
from rlm_mhc.fn.context import Context, positions
from rlm_mhc.fn.kernels import REFERENCE, Kernels
from rlm_mhc.fn.linear import embedding, linear
from rlm_mhc.fn.mhc import Hidden, collapse_learned, collapse_streams, expand_streams
from rlm_mhc.fn.norm import norm
from rlm_mhc.fn.replaceable import is_present
from rlm_mhc.params import Linear, LMParams
from rlm_mhc.types import Activations, Logits, Tokens
from rlm_mhc.variants import PRESETS


class Backbone(NamedTuple):
    """The state after the last block, streams `[*b, s, n, c]` (without mHC `[*b, s, c]`), and the residual mappings of
    all sub-layers in their order, each `[*b, s, n, n]`."""

    hidden: Hidden
    res: tuple[Tensor, ...]


def forward(
    params: LMParams,
    tokens: Tokens,
    config: ModelConfig,
    kernels: Kernels = REFERENCE,
    *,
    context: Context | None = None,
) -> Logits:
    """Logits `[*b, s, v]` of the token after each position.

    Args:
        params: the tree of `fn.init`.
        tokens: `[*b, s]` ids in `[0, vocab_size)`, `s ≤ max_seq_len`.
        config: its shape.
        kernels: the operations to run it with.
        context: of `fn.positions`, with documents or a window; None: one document.

    Raises:
        ValueError: when there is no token, or the sequence is longer than `config.max_seq_len`.

    >>> from rlm_mhc import fn
    >>> config = ModelConfig.preset("tiny")
    >>> fn.forward(fn.init(config), torch.tensor([[1, 2, 3]]), config).shape
    torch.Size([1, 3, 4096])
    """
    return head(params, backbone(params, tokens, config, kernels, context=context).hidden, config, kernels)


def backbone(
    params: LMParams,
    tokens: Tokens,
    config: ModelConfig,
    kernels: Kernels = REFERENCE,
    *,
    context: Context | None = None,
) -> Backbone:
    """Everything but the head; see `forward`."""
    context = positions(tokens, config) if context is None else context
    hidden = embed(params, tokens, config)
    res: tuple[Tensor, ...] = ()
    for layer in params.layers:
        hidden, layer_res, _ = block(layer, hidden, context, config, kernels)
        res += layer_res
    return Backbone(hidden, res)


def embed(params: LMParams, tokens: Tokens, config: ModelConfig) -> Hidden:
    """The embedding of each token as the blocks take it; see `expand` and `require_kind`."""
    require_kind(params, config)
    return expand(embedding(params.embed_tokens, tokens), config)


def expand(x: Float[Tensor, "*b s c"], config: ModelConfig) -> Hidden:
    """`x` repeated as `mhc_flows` equal streams; where `pre` comes early, with the first one, which reads stream 0."""
    if not config.mhc_enabled:
        return Hidden(x)
    streams = expand_streams(x, config.mhc_flows)
    if not PRESETS[config.mhc_preset].early_pre:
        return Hidden(streams)
    first = torch.arange(config.mhc_flows, dtype=torch.int64, device=x.device) == 0
    pre = first.to(torch.promote_types(x.dtype, torch.float32)).expand(streams.shape[:-1])
    return Hidden(streams, pre.contiguous())


def require_kind(params: LMParams, config: ModelConfig) -> None:
    """Refuse parameters with mHC weights for a config without mHC, and the other way round.

    Raises:
        ValueError: saying so.
    """
    if params.layers and is_present(params.layers[0].attn_mhc) != config.mhc_enabled:
        raise ValueError(f"mhc_enabled={config.mhc_enabled}: the parameters are those of the opposite")
    learned = config.mhc_enabled and PRESETS[config.mhc_preset].collapse == "learned"
    if params.layers and is_present(params.head_mhc) != learned:
        raise ValueError(f"mhc_preset={config.mhc_preset!r}: the parameters are those of another preset")


def head(params: LMParams, hidden: Hidden, config: ModelConfig, kernels: Kernels = REFERENCE) -> Logits:
    """Collapse the streams, normalise, project onto the vocabulary (the embedding itself when tied)."""
    x = norm(params.norm, collapse(params, hidden, config, kernels), partial(kernels.rms_norm, eps=config.norm_eps))
    return linear(params.lm_head or Linear(params.embed_tokens.weight), x)


def collapse(params: LMParams, hidden: Hidden, config: ModelConfig, kernels: Kernels = REFERENCE) -> Activations:
    """The streams as one: their mean, their learned sum, or by the last sub-layer's `pre`, as the preset has it."""
    if not config.mhc_enabled:
        return hidden.x
    if isinstance(hidden.pre, Tensor):
        return kernels.mhc_aggregate(hidden.x, hidden.pre)
    if is_present(params.head_mhc):
        return collapse_learned(params.head_mhc, hidden.x, eps=config.norm_eps, preset=config.mhc_preset)
    return collapse_streams(hidden.x)
