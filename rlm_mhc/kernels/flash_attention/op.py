"""The flash-attn package's forward and backward, called by their two halves.

Its own autograd function cannot be used under `torch.func` (flash-attention issue 2071).
"""

import importlib.metadata
import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

from rlm_mhc.fn.layout import packed, require_heads, require_shape
from rlm_mhc.stage import Grads, Stage, Staged, Weights

NO_WINDOW = -1
Heads = tuple[Tensor, Tensor, Tensor]


def require_flash_attention(head_dim: int) -> None:
    """Refuse to go on without the package, or with heads that it does not take.

    Raises:
        ValueError: when flash-attn 2.7 or newer 2 is not installed, or `head_dim` is no multiple of 8 up to 256.
    """
    if importlib.util.find_spec("flash_attn") is None:
        raise ValueError("flash-attn is not installed: pip install 'rlm-mhc[gpu]', or use training.attention=torch")
    version = importlib.metadata.version("flash_attn")
    major, minor = (int(part) for part in version.split(".")[:2])
    if major != 2 or minor < 7:
        raise ValueError(f"flash-attn {version}: expected 2.7 or a newer 2, or use training.attention=torch")
    if head_dim % 8 or head_dim > 256:
        raise ValueError(
            f"head_dim={head_dim}: flash-attn takes multiples of 8 up to 256; use training.attention=torch"
        )


def _function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    require_heads(q, k, v)
    q, k, v = (x.transpose(-2, -3) for x in (q, k, v))
    return flash_attn_func(q, k, v, causal=True).transpose(-2, -3)


def _forward(weights: Weights, qkv: Heads) -> tuple[Tensor, Any]:
    from flash_attn.flash_attn_interface import _flash_attn_forward

    require_heads(*qkv)
    q, k, v = (packed(x.transpose(-2, -3)) for x in qkv)
    scale = 1 / math.sqrt(q.shape[-1])
    out, lse, _, random_state = _flash_attn_forward(
        q, k, v, 0.0, scale, True, NO_WINDOW, NO_WINDOW, 0.0, None, return_softmax=False
    )
    return out.transpose(-2, -3), (out, lse, random_state)


def _backward(weights: Weights, qkv: Heads, saved: Any, cotangent: Tensor) -> tuple[Grads, Heads]:
    from flash_attn.flash_attn_interface import _flash_attn_backward

    out, lse, random_state = saved
    require_heads(*qkv)
    require_shape("cotangent", cotangent, qkv[0].device, tuple(qkv[0].shape), qkv[0].dtype)
    q, k, v, g = (packed(x.transpose(-2, -3)) for x in (*qkv, cotangent))
    gq, gk, gv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    scale = 1 / math.sqrt(q.shape[-1])
    _flash_attn_backward(
        g,
        q,
        k,
        v,
        out,
        lse,
        gq,
        gk,
        gv,
        0.0,
        scale,
        True,
        NO_WINDOW,
        NO_WINDOW,
        0.0,
        None,
        True,
        rng_state=random_state,
    )
    return {}, (gq.transpose(-2, -3), gk.transpose(-2, -3), gv.transpose(-2, -3))


flash_attention = Staged(_function, Stage(_forward, _backward))
"""`(q, k, v)` as `fn.causal_attention`, fp16 or bf16 on CUDA: `REFERENCE._replace(attention=flash_attention)`."""
