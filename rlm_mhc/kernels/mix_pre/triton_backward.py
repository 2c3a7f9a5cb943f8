"""Triton kernels of the backward of `mix_pre`: through the norm, and through the mappings.

What is summed over tokens is summed by a number of programs that depends on the shape alone, each over its own tokens
in their order, and their sums are added by `torch.sum`, whose order is fixed: the same bits in every run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlm_mhc.kernels.launch import blocks, interpreted, on_device, power_of_two, warps
from rlm_mhc.kernels.mix_pre.tiling import MOST_AT_ONCE
from rlm_mhc.kernels.sinkhorn.triton import sinkhorn_backward

NORM_PROGRAMS, MAPPING_PROGRAMS = 512, 1024  # some to each multiprocessor


@triton.jit(do_not_specialize=["tokens"])
def norm_kernel(
    x_ptr,
    pre_ptr,
    weight_ptr,
    rstd_ptr,
    g_ptr,
    mean_ptr,
    g_u_ptr,
    g_pre_ptr,
    g_weight_ptr,
    tokens,
    C: tl.constexpr,
    N: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """From the cotangent of the normed aggregate to that of `pre`, and sums for `weight`.

    Of the cotangent of the aggregate its mean over the norm's direction is written, from which `apply_kernel` makes it
    again, or with `WHOLE` itself. The streams are loaded twice, the second time from a cache: held in registers they
    would leave room for half as many programs.
    """
    program = tl.program_id(0)
    cols = tl.arange(0, BC)
    within = cols < C
    weight = tl.load(weight_ptr + cols, mask=within, other=0.0).to(tl.float32)
    g_weight = tl.zeros((BC,), tl.float32)
    for start in range(program * BT, tokens, tl.num_programs(0) * BT):
        t = start + tl.arange(0, BT).to(tl.int64)
        in_range = t < tokens
        live = in_range[:, None] & within[None, :]
        row = t[:, None] * C + cols[None, :]
        u = tl.zeros((BT, BC), tl.float32)
        for j in tl.static_range(N):
            x = tl.load(x_ptr + (t[:, None] * N + j) * C + cols[None, :], mask=live, other=0.0).to(tl.float32)
            u += tl.load(pre_ptr + t * N + j, mask=in_range, other=0.0)[:, None] * x
        rstd = tl.load(rstd_ptr + t, mask=in_range, other=0.0)[:, None]
        unit = u * rstd
        g = tl.load(g_ptr + row, mask=live, other=0.0).to(tl.float32)
        g_weight += tl.sum(g * unit, 0)
        g = g * weight[None, :]
        mean = tl.sum(g * unit, 1) / C
        g_u = rstd * (g - unit * mean[:, None])
        if WHOLE:
            tl.store(g_u_ptr + row, g_u.to(g_u_ptr.dtype.element_ty), mask=live)
        else:
            tl.store(mean_ptr + t, mean, mask=in_range)
        for j in tl.static_range(N):
            x = tl.load(x_ptr + (t[:, None] * N + j) * C + cols[None, :], mask=live, other=0.0).to(tl.float32)
            tl.store(g_pre_ptr + t * N + j, tl.sum(g_u * x, 1), mask=in_range)
    tl.store(g_weight_ptr + program * C + cols, g_weight, mask=within)


@triton.jit
def gate_backward(
    h_ptr, g_ptr, g_more_ptr, out_ptr, t, mask, line, alpha, bias, r, group: tl.constexpr, MORE: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Of `(group + 1) · sigmoid(alpha · h + bias)`: writes the cotangent of `v · phi`, returns what is summed."""
    M: tl.constexpr = 2 * N + N * N
    at = t[:, None] * M + group * N + line[None, :]
    h = tl.load(h_ptr + at, mask=mask, other=0.0)
    own = t[:, None] * N + line[None, :]
    g = tl.load(g_ptr + own, mask=mask, other=0.0)
    if MORE:
        g += tl.load(g_more_ptr + own, mask=mask, other=0.0)
    gate = tl.sigmoid(alpha * h + bias[None, :])
    g = g * (group + 1) * gate * (1 - gate)
    tl.store(out_ptr + at, g * alpha * r[:, None], mask=mask)
    return tl.sum(g, 0), tl.sum(g * h, 1)


@triton.jit(do_not_specialize=["tokens"])
def mapping_kernel(
    h_ptr,
    scale_ptr,
    alpha_ptr,
    bias_ptr,
    g_pre_ptr,
    g_more_ptr,
    g_post_ptr,
    g_res_ptr,
    g_product_ptr,
    inner_ptr,
    sums_ptr,
    tokens,
    C: tl.constexpr,
    N: tl.constexpr,
    BT: tl.constexpr,
    P: tl.constexpr,
    ITERS: tl.constexpr,
    EPS: tl.constexpr,
    MORE: tl.constexpr,
):
    """From the cotangents of the mappings to that of `v · phi`, to `inner = Σ g_h · h / (rms² · n·c)`, and to the sums
    of alpha and bias."""
    M: tl.constexpr = 2 * N + N * N
    program = tl.program_id(0)
    line = tl.arange(0, P)
    real = line < N
    entry = line[:, None] * N + line[None, :]
    inside = (real[:, None] & real[None, :])[None, :, :]
    alpha_pre, alpha_post, alpha_res = tl.load(alpha_ptr), tl.load(alpha_ptr + 1), tl.load(alpha_ptr + 2)
    bias_pre = tl.load(bias_ptr + line, mask=real, other=0.0)
    bias_post = tl.load(bias_ptr + N + line, mask=real, other=0.0)
    bias_res = tl.load(bias_ptr + 2 * N + entry[None, :, :], mask=inside, other=0.0)
    of_pre, of_post = tl.zeros((P,), tl.float32), tl.zeros((P,), tl.float32)
    of_res = tl.zeros((P, P), tl.float32)
    a_pre, a_post, a_res = tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32)
    for start in range(program * BT, tokens, tl.num_programs(0) * BT):
        t = start + tl.arange(0, BT).to(tl.int64)
        in_range = t < tokens
        r = tl.load(scale_ptr + t, mask=in_range, other=0.0)
        mask = in_range[:, None] & real[None, :]
        pre, h_pre = gate_backward(
            h_ptr, g_pre_ptr, g_more_ptr, g_product_ptr, t, mask, line, alpha_pre, bias_pre, r, 0, MORE, N
        )
        post, h_post = gate_backward(
            h_ptr, g_post_ptr, g_post_ptr, g_product_ptr, t, mask, line, alpha_post, bias_post, r, 1, False, N
        )
        at = t[:, None, None] * M + 2 * N + entry[None, :, :]
        mask = in_range[:, None, None] & inside
        h = tl.load(h_ptr + at, mask=mask, other=0.0)
        own = t[:, None, None] * N * N + entry[None, :, :]
        g = tl.load(g_res_ptr + own, mask=mask, other=0.0)
        g = sinkhorn_backward(alpha_res * h + bias_res, g, inside, ITERS, EPS)
        tl.store(g_product_ptr + at, g * alpha_res * r[:, None, None], mask=mask)
        h_res = tl.sum(tl.sum(g * h, 2), 1)
        inner = alpha_pre * h_pre + alpha_post * h_post + alpha_res * h_res
        tl.store(inner_ptr + t, inner * r * r / (N * C), mask=in_range)
        of_pre += pre
        of_post += post
        of_res += tl.sum(g, 0)
        a_pre += h_pre
        a_post += h_post
        a_res += h_res
    own = sums_ptr + program * (M + 3)
    tl.store(own, tl.sum(a_pre, 0))
    tl.store(own + 1, tl.sum(a_post, 0))
    tl.store(own + 2, tl.sum(a_res, 0))
    tl.store(own + 3 + line, of_pre, mask=real)
    tl.store(own + 3 + N + line, of_post, mask=real)
    tl.store(own + 3 + 2 * N + entry, of_res, mask=real[:, None] & real[None, :])


class Normed(NamedTuple):
    """What `apply_kernel` reads of the backward of the norm: its `weight`, `rstd`, the cotangent `g` of its output, and
    the mean of `g · weight` over its direction; where streams do not stay in registers the cotangent of its input
    alone, as `g`."""

    weight: Tensor | None
    rstd: Tensor | None
    g: Tensor
    mean: Tensor | None


def through_norm(x: Tensor, pre: Tensor, weight: Tensor, rstd: Tensor, g: Tensor) -> tuple[Normed, Tensor, Tensor]:
    """What `to_streams` needs of it, and the cotangents of `pre` and of `weight`."""
    tokens, n, c = x.shape
    whole = n > MOST_AT_ONCE
    g_pre = torch.empty_like(pre)
    mean, g_u = (None, torch.empty_like(g)) if whole else (torch.empty_like(rstd), None)
    width = power_of_two(c)
    bt = 64 if interpreted() else max(1, 2048 // width)
    programs = max(1, min(NORM_PROGRAMS, blocks(tokens, bt)))
    partial = pre.new_empty(programs, c)
    with on_device(x):
        norm_kernel[(programs,)](
            x, pre, weight, rstd, g, mean, g_u, g_pre, partial, tokens,
            C=c, N=n, BT=bt, BC=width, WHOLE=whole,
            num_warps=max(4, warps(bt * width * 2)),
        )  # fmt: skip
    normed = Normed(weight, rstd, g, mean) if g_u is None else Normed(None, None, g_u, None)
    return normed, g_pre, partial.sum(0).to(weight.dtype)


def through_mappings(
    h: Tensor,
    scale: Tensor,
    alpha: Tensor,
    bias: Tensor,
    cotangents: tuple[Tensor, Tensor | None, Tensor, Tensor],
    c: int,
    num_iters: int,
    sinkhorn_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The cotangent of `v · phi`, `inner`, and those of alpha and bias, from those of `pre`, `pre`, `post`, `res`."""
    tokens, n = cotangents[2].shape
    g_product, inner = torch.empty_like(h), torch.empty_like(scale)
    p = power_of_two(n)
    bt = 64 if interpreted() else max(1, 512 // (p * p))
    programs = max(1, min(MAPPING_PROGRAMS, blocks(tokens, bt)))
    sums = h.new_empty(programs, 3 + h.shape[-1])
    with on_device(h):
        mapping_kernel[(programs,)](
            h, scale, alpha, bias, *cotangents, g_product, inner, sums, tokens, C=c, N=n, BT=bt, P=p, ITERS=num_iters,
            EPS=sinkhorn_eps, MORE=cotangents[1] is not None, num_warps=4,
        )  # fmt: skip
    total = sums.sum(0)
    return g_product, inner, total[:3].clone(), total[3:].clone()
