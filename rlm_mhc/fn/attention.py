"""Causal self-attention with grouped heads."""

from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlm_mhc.fn.rope import rotary_embedding
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
    if forward_ad._current_level >= 0:
        # Inside jvp: PyTorch's fused attention has no forward-mode derivative, its plain formula has. PyTorch shows
        # the level of forward mode under no public name.
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[-3] != k.shape[-3])


def self_attention(
    params: SelfAttention,
    x: Float[Tensor, "*b s c"],
    cos: RotaryTable,
    sin: RotaryTable,
    attention: Callable[[Tensor, Tensor, Tensor], Tensor] = causal_attention,
) -> Float[Tensor, "*b s c"]:
    """Project to heads of width `2 · cos.shape[-1]`, rotate queries and keys, attend causally, project back.

    >>> import torch; from rlm_mhc import fn, ModelConfig
    >>> layer = fn.init(ModelConfig.preset("tiny")).layers[0]
    >>> fn.self_attention(layer.self_attn, torch.randn(1, 7, 128), *fn.rotary_table(torch.arange(7), 32)).shape
    torch.Size([1, 7, 128])
    """
    q, k, v = (
        rearrange(F.linear(x, w.weight), "... s (h d) -> ... h s d", d=2 * cos.shape[-1])
        for w in (params.q_proj, params.k_proj, params.v_proj)
    )
    out = attention(rotary_embedding(q, cos, sin), rotary_embedding(k, cos, sin), v)
    return F.linear(rearrange(out, "... h s d -> ... s (h d)"), params.o_proj.weight)
