"""Causal attention as a stage whose backward reads the saved output and log-sum-exp: nothing is computed twice.

PyTorch's own fused kernels, called by their two halves: the flash kernel on the CPU, on CUDA flash for fp16 and bf16
and memory-efficient attention for fp32. Anything else is computed by the plain formula. On CUDA the backwards of the
fused kernels sum in the order of arrival unless `torch.use_deterministic_algorithms` is on, flash-attn's do not.
"""

import math
from typing import Any

import torch
from torch import Tensor

from rlm_mhc.fn.attention import causal_attention
from rlm_mhc.fn.layout import require_heads, require_shape, rows
from rlm_mhc.fn.norm import widen
from rlm_mhc.stage.core import Grads, Stage, Weights, bring_stage, stage, stage_of

aten = torch.ops.aten
Heads = tuple[Tensor, Tensor, Tensor]
FLASH_HEAD_DIM = 256
# Their flash backward has no room for wider heads.
SMALL_GPUS, SMALL_GPU_HEAD_DIM = ((8, 6), (8, 9), (12, 0)), 192


def attention_stage(kernel: Any) -> Stage:
    """The stage `(q, k, v) -> output` of an attention function.

    A kernel that brings a stage is run by that; of any other function the backward is derived, so that the forward runs
    again in it.
    """
    return stage_of(kernel) or stage(lambda qkv: kernel(*qkv))


def _choose(q: Tensor) -> str:
    if q.device.type == "cpu":
        return "cpu"
    if q.device.type == "cuda" and q.shape[-1] <= FLASH_HEAD_DIM and q.shape[-1] % 8 == 0:
        capability = torch.cuda.get_device_capability(q.device)
        whole = q.shape[-1] <= SMALL_GPU_HEAD_DIM or capability not in SMALL_GPUS
        if q.dtype in (torch.float16, torch.bfloat16) and capability >= (8, 0) and whole:
            return "flash"
        if q.dtype in (torch.float16, torch.float32):
            return "efficient"
    return "plain"


def _forward(weights: Weights, qkv: Heads) -> tuple[Tensor, Any]:
    q, k, v = qkv
    require_heads(q, k, v)
    q, k, v = (rows(x) for x in (q, k, v))
    kind = _choose(q)
    if kind == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        return out, (out, lse)
    if kind == "flash":
        result = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
        # Without dropout its random state and, without ragged sequences, its offsets are empty.
        return result[0], (result[0], result[1], result[6], result[7])
    if kind == "efficient":
        k, v = _repeat(k, q), _repeat(v, q)
        result = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True)
        return result[0], tuple(result)
    return _plain_forward({}, (q, k, v))


def _backward(weights: Weights, qkv: Heads, saved: Any, cotangent: Tensor) -> tuple[Grads, Heads]:
    require_heads(*qkv)
    require_shape("cotangent", cotangent, qkv[0].device, tuple(qkv[0].shape), qkv[0].dtype)
    cotangent, q, k, v = (rows(x) for x in (cotangent, *qkv))
    kind = _choose(q)
    if kind == "cpu":
        return {}, aten._scaled_dot_product_flash_attention_for_cpu_backward(cotangent, q, k, v, *saved, 0.0, True)
    if kind == "flash":
        out, lse, seed, offset = saved
        s = q.shape[-2]
        return {}, aten._scaled_dot_product_flash_attention_backward(
            cotangent, q, k, v, out, lse, None, None, s, s, 0.0, True, seed, offset
        )
    if kind == "efficient":
        out, lse, seed, offset = saved
        mask = [True, True, True, False]
        gq, gk, gv, _ = aten._scaled_dot_product_efficient_attention_backward(
            cotangent, q, _repeat(k, q), _repeat(v, q), None, out, lse, seed, offset, 0.0, mask, True
        )
        return {}, (gq, _sum_groups(gk, k), _sum_groups(gv, v))
    return _plain_backward(weights, (q, k, v), saved, cotangent)


def _plain_forward(weights: Weights, qkv: Heads) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    q, k, v = qkv
    scores = _scores(q, k)
    lse = scores.logsumexp(-1)
    out = (scores - lse.unsqueeze(-1)).exp().to(v.dtype) @ _repeat(v, q)
    return out, (out, lse)


def _plain_backward(
    weights: Weights, qkv: Heads, saved: tuple[Tensor, Tensor], cotangent: Tensor
) -> tuple[Grads, Heads]:
    q, k, v = qkv
    out, lse = saved
    p = (_scores(q, k) - lse.unsqueeze(-1)).exp()
    gp = (cotangent @ _repeat(v, q).mT).to(p.dtype)
    # Σ_j p[i, j] · gp[i, j] is the product of the output with its cotangent.
    inner = (cotangent.to(p.dtype) * out.to(p.dtype)).sum(-1, keepdim=True)
    gs = (p * (gp - inner) / math.sqrt(q.shape[-1])).to(q.dtype)
    gv = p.to(v.dtype).mT @ cotangent
    return {}, (gs @ _repeat(k, q), _sum_groups(gs.mT @ q, k), _sum_groups(gv, v))


def _scores(q: Tensor, k: Tensor) -> Tensor:
    s = q.shape[-2]
    root = q.shape[-1] ** -0.25  # of the scale, on each side: the product alone may leave the range of fp16
    scores = widen((q * root) @ (_repeat(k, q) * root).mT)
    return scores.masked_fill(torch.ones(s, s, dtype=torch.bool, device=q.device).triu(1), -math.inf)


def _repeat(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3)


def _sum_groups(g: Tensor, x: Tensor) -> Tensor:
    return g.unflatten(-3, (x.shape[-3], -1)).sum(-3)


SDPA, PLAIN = Stage(_forward, _backward), Stage(_plain_forward, _plain_backward)
bring_stage(causal_attention, SDPA)
