"""Causal self-attention with grouped heads."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlm_mhc.fn.context import Context, attention_mask
from rlm_mhc.fn.linear import linear
from rlm_mhc.fn.norm import norm, rms_norm
from rlm_mhc.fn.replaceable import is_present, replaceable
from rlm_mhc.fn.rope import rotary_embedding
from rlm_mhc.fn.transforms import in_forward_mode
from rlm_mhc.params import SelfAttention
from rlm_mhc.types import RotaryTable


def causal_attention(
    q: Float[Tensor, "*b h s d"], k: Float[Tensor, "*b kv s d"], v: Float[Tensor, "*b kv s d"]
) -> Float[Tensor, "*b h s d"]:
    """`softmax(q · kᵀ / sqrt(d)) · v`, each position seeing itself and what came before.

    Query head `i` reads key/value head `i // (h / kv)`. Runs `F.scaled_dot_product_attention`.

    >>> import torch
    >>> causal_attention(*[torch.ones(1, 2, 3, 4)] * 3).shape
    torch.Size([1, 2, 3, 4])
    """
    if in_forward_mode():
        # Inside jvp: PyTorch's fused attention has no forward-mode derivative, its plain formula has. PyTorch shows
        # the level of forward mode under no public name.
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[-3] != k.shape[-3])


class Attended(NamedTuple):
    """`output`: of attention; `cache`: a layer's keys and values with the new ones, or what `attend` returns there."""

    output: Tensor
    cache: Any


# How a layer attends: `attend(q, k, v, context, cache)`, heads `[*b, h, s, d]`.
Attend = Callable[[Tensor, Tensor, Tensor, Context, Any], Attended]


def attend(
    q: Float[Tensor, "*b h s d"],
    k: Float[Tensor, "*b kv s d"],
    v: Float[Tensor, "*b kv s d"],
    context: Context,
    cache: tuple[()] = (),
    attention: Callable[[Tensor, Tensor, Tensor], Tensor] = causal_attention,
) -> Attended:
    """Attend within the sequence, and within its documents and window; without a cache.

    Args:
        q: queries.
        k: keys.
        v: values.
        context: where the tokens stand.
        cache: none.
        attention: `causal_attention`, or another function of it; not used with documents or a window.

    >>> import torch
    >>> heads, table = torch.ones(1, 2, 3, 4), torch.zeros(3, 2)
    >>> attend(heads, heads, heads, Context(table, table)).output.shape
    torch.Size([1, 2, 3, 4])
    """
    mask = attention_mask(context)
    return Attended(attention(q, k, v) if mask is None else masked_attention(q, k, v, mask), cache)


def masked_attention(
    q: Float[Tensor, "*b h s d"],
    k: Float[Tensor, "*b kv places d"],
    v: Float[Tensor, "*b kv places d"],
    mask: Bool[Tensor, "*t s places"],
) -> Float[Tensor, "*b h s d"]:
    """`softmax(q · kᵀ / sqrt(d)) · v` over the places where `mask[query, key]` is True.

    Query head `i` reads key/value head `i // (h / kv)`. The heads of a group stand side by side as if they were
    positions, so that keys and values are not repeated.

    >>> import torch
    >>> mask = torch.tensor([[True, True, False]])
    >>> masked_attention(torch.ones(1, 4, 1, 2), *[torch.ones(1, 2, 3, 2)] * 2, mask)[0, 0]
    tensor([[1., 1.]])
    """
    group = q.shape[-3] // k.shape[-3]
    grouped = rearrange(q, "... (kv group) s d -> ... kv (group s) d", group=group)
    mask = mask.unsqueeze(-3).expand(*mask.shape[:-2], group, *mask.shape[-2:]).flatten(-3, -2).unsqueeze(-3)
    with sdpa_kernel(SDPBackend.MATH) if in_forward_mode() else nullcontext():
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
    return rearrange(out, "... kv (group s) d -> ... (kv group) s d", group=group)


@replaceable(5)
def self_attention(
    params: SelfAttention,
    x: Float[Tensor, "*b s c"],
    context: Context,
    cache: Any = (),
    attend: Attend = attend,
    normalise: Callable[[Tensor, Tensor], Tensor] = rms_norm,
) -> Attended:
    """Project to heads (`heads`), attend, project back; or `params(x, context, cache, attend, normalise)`, see
    `replaceable`.

    >>> import torch; from rlm_mhc import fn, ModelConfig
    >>> config = ModelConfig.preset("tiny")
    >>> layer, context = fn.init(config).layers[0], fn.positions(torch.zeros(1, 7, dtype=torch.int64), config)
    >>> fn.self_attention(layer.self_attn, torch.randn(1, 7, 128), context).output.shape
    torch.Size([1, 7, 128])
    """
    out, cache = attend(*heads(params, x, context.cos, context.sin, normalise), context, cache)
    return Attended(linear(params.o_proj, rearrange(out, "... h s d -> ... s (h d)")), cache)


def heads(
    params: SelfAttention,
    x: Float[Tensor, "*b s c"],
    cos: RotaryTable,
    sin: RotaryTable,
    normalise: Callable[[Tensor, Tensor], Tensor] = rms_norm,
) -> tuple[Float[Tensor, "*b h s d"], Float[Tensor, "*b kv s d"], Float[Tensor, "*b kv s d"]]:
    """Queries, keys and values by head of width `2 · cos.shape[-1]`; queries and keys rotated, and before that
    normalised by `normalise(x, weight)` where the model has weights for it."""
    q, k, v = (
        rearrange(linear(w, x), "... s (h d) -> ... h s d", d=2 * cos.shape[-1])
        for w in (params.q_proj, params.k_proj, params.v_proj)
    )
    if is_present(params.q_norm) and is_present(params.k_norm):
        q, k = norm(params.q_norm, q, normalise), norm(params.k_norm, k, normalise)
    return rotary_embedding(q, cos, sin), rotary_embedding(k, cos, sin), v
