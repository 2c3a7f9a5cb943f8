"""Causal self-attention with grouped heads."""

from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlm_mhc.fn.linear import linear
from rlm_mhc.fn.norm import rms_norm
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


def self_attention(
    params: SelfAttention | Callable[..., Tensor],
    x: Float[Tensor, "*b s c"],
    cos: RotaryTable,
    sin: RotaryTable,
    attention: Callable[[Tensor, Tensor, Tensor], Tensor] = causal_attention,
    norm: Callable[[Tensor, Tensor], Tensor] = rms_norm,
) -> Float[Tensor, "*b s c"]:
    """Project to heads (`heads`), attend by `attention(q, k, v)`, project back; or `params(x, cos, sin, attention,
    norm)` where a function stands in for the weights.

    >>> import torch; from rlm_mhc import fn, ModelConfig
    >>> layer = fn.init(ModelConfig.preset("tiny")).layers[0]
    >>> fn.self_attention(layer.self_attn, torch.randn(1, 7, 128), *fn.rotary_table(torch.arange(7), 32)).shape
    torch.Size([1, 7, 128])
    """
    if not isinstance(params, SelfAttention):
        return params(x, cos, sin, attention, norm)
    out = attention(*heads(params, x, cos, sin, norm))
    return linear(params.o_proj, rearrange(out, "... h s d -> ... s (h d)"))


def heads(
    params: SelfAttention,
    x: Float[Tensor, "*b s c"],
    cos: RotaryTable,
    sin: RotaryTable,
    norm: Callable[[Tensor, Tensor], Tensor] = rms_norm,
) -> tuple[Float[Tensor, "*b h s d"], Float[Tensor, "*b kv s d"], Float[Tensor, "*b kv s d"]]:
    """Queries, keys and values by head of width `2 · cos.shape[-1]`; queries and keys normalised by `norm(x, weight)`
    where the model has weights for it, and rotated."""
    q, k, v = (
        rearrange(linear(w, x), "... s (h d) -> ... h s d", d=2 * cos.shape[-1])
        for w in (params.q_proj, params.k_proj, params.v_proj)
    )
    if params.q_norm and params.k_norm:
        q, k = norm(q, params.q_norm.weight), norm(k, params.k_norm.weight)
    return rotary_embedding(q, cos, sin), rotary_embedding(k, cos, sin), v
