"""Triton kernels of the forward of `mix_pre`: one pass over the streams for the projection, one for the aggregate.

Every offset that grows with the tokens is computed in 64 bits. `tokens` is never a constant of a kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlm_mhc.kernels.launch import blocks, interpreted, on_device, power_of_two, warps
from rlm_mhc.kernels.mix_post.triton import load_entries, load_streams, mixed_stream
from rlm_mhc.kernels.mix_pre.tiling import LEAST_COLUMNS, MOST_AT_ONCE
from rlm_mhc.kernels.sinkhorn.triton import sinkhorn
from rlm_mhc.kernels.tiles import dot_wide

# Tokens whose mappings a program makes: Sinkhorn takes a warp as long for one of them as for several.
FINISHED_AT_ONCE = 128 if interpreted() else 16


@triton.jit
def load_phi(phi_ptr, channels, live, m: tl.constexpr, M: tl.constexpr, MP: tl.constexpr):
    """The rows of `phi [n·c, M]` at some channels, columns from `m` on, `MP` of them, zeros beyond `M`."""
    columns = m + tl.arange(0, MP)
    mask = live[:, None] & (columns < M)[None, :]
    return tl.load(phi_ptr + channels[:, None] * M + columns[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def project_kernel(
    x_ptr,
    y_ptr,
    post_ptr,
    res_ptr,
    given_ptr,
    phi_ptr,
    mixed_ptr,
    u_ptr,
    h_ptr,
    scale_ptr,
    rstd_ptr,
    tokens,
    eps,
    C: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    MP: tl.constexpr,
    G: tl.constexpr,
    COMBINE: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """`h = (v · phi) / rms(v)` of the streams `x`, read `G` of them at a time.

    Where `G` is all of them, with `COMBINE` of the streams that `mix_post` makes of `x`, which are written to `mixed`;
    and with `GIVEN` also `u = Σ_j given[j] · x[j]`, not normalised yet, and `rstd = 1 / rms(u)`.
    """
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    in_range = t < tokens
    h = tl.zeros((BT, MP), tl.float32)
    squares = tl.zeros((BT, BC), tl.float32)
    u_squares = tl.zeros((BT, BC), tl.float32)
    across: tl.constexpr = (C + BC - 1) // BC
    # Before the loop: in it they would be loaded, and held ahead, for each step.
    if COMBINE:
        post = load_entries(post_ptr, t, in_range, 0, 1, N, N)
        res = load_entries(res_ptr, t, in_range, 0, 1, N * N, N * N)
    if GIVEN:
        given = load_entries(given_ptr, t, in_range, 0, 1, N, N)
    for step in range(0, N // G * across):
        first = step // across * G
        cols = step % across * BC + tl.arange(0, BC)
        within = cols < C
        live = in_range[:, None] & within[None, :]
        xs = load_streams(x_ptr, t, cols, live, first, C, N, G)
        if COMBINE:
            y = tl.load(y_ptr + t[:, None] * C + cols[None, :], mask=live, other=0.0).to(tl.float32)
        u = tl.zeros((BT, BC), tl.float32)
        for i in tl.static_range(G):
            x = xs[i]
            if COMBINE:
                x = (mixed_stream(xs, res, i * N, N) + post[i][:, None] * y).to(x_ptr.dtype.element_ty)
                tl.store(mixed_ptr + (t[:, None] * N + i) * C + cols[None, :], x, mask=live)
            h = dot_wide(x, load_phi(phi_ptr, (first + i) * C + cols, within, 0, M, MP), h)
            wide = x.to(tl.float32)
            squares += wide * wide
            if GIVEN:
                u += given[i][:, None] * wide
        if GIVEN:
            u_squares += u * u
            tl.store(u_ptr + t[:, None] * C + cols[None, :], u.to(u_ptr.dtype.element_ty), mask=live)
    scale = 1 / tl.sqrt(tl.sum(squares, 1) / (N * C) + eps)
    tl.store(scale_ptr + t, scale, mask=in_range)
    columns = tl.arange(0, MP)
    mask = in_range[:, None] & (columns < M)[None, :]
    tl.store(h_ptr + t[:, None] * M + columns[None, :], h * scale[:, None], mask=mask)
    if GIVEN:
        tl.store(rstd_ptr + t, 1 / tl.sqrt(tl.sum(u_squares, 1) / C + eps), mask=in_range)


@triton.jit(do_not_specialize=["tokens"])
def finish_kernel(
    x_ptr,
    given_ptr,
    u_ptr,
    h_ptr,
    alpha_ptr,
    bias_ptr,
    weight_ptr,
    pre_ptr,
    post_ptr,
    res_ptr,
    rstd_ptr,
    tokens,
    eps,
    C: tl.constexpr,
    N: tl.constexpr,
    BT: tl.constexpr,
    STEP: tl.constexpr,
    BC: tl.constexpr,
    P: tl.constexpr,
    ITERS: tl.constexpr,
    EPS: tl.constexpr,
    AGGREGATE: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """From `h` to the mappings of `BT` tokens, and `STEP` by `STEP` to their normed aggregate by `pre`, with `GIVEN` by
    what is given. Without `AGGREGATE` the aggregate is there already, and is normed in place.
    """
    M: tl.constexpr = 2 * N + N * N
    # From the last token to the first: what the kernel before has written last may still be in the cache.
    start = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BT
    t = start + tl.arange(0, BT)
    in_range = t < tokens
    line = tl.arange(0, P)
    at, mask = N + line, in_range[:, None] & (line < N)[None, :]
    post = tl.load(h_ptr + t[:, None] * M + at[None, :], mask=mask, other=0.0)
    post = 2 * tl.sigmoid(tl.load(alpha_ptr + 1) * post + tl.load(bias_ptr + at, mask=line < N, other=0.0)[None, :])
    tl.store(post_ptr + t[:, None] * N + line[None, :], post, mask=mask)
    entry = line[:, None] * N + line[None, :]
    inside = ((line < N)[:, None] & (line < N)[None, :])[None, :, :]
    mask = in_range[:, None, None] & inside
    logits = tl.load(h_ptr + t[:, None, None] * M + 2 * N + entry[None, :, :], mask=mask, other=0.0)
    bias = tl.load(bias_ptr + 2 * N + entry[None, :, :], mask=inside, other=0.0)
    res = sinkhorn(tl.load(alpha_ptr + 2) * logits + bias, inside, ITERS, EPS)
    tl.store(res_ptr + t[:, None, None] * N * N + entry[None, :, :], res, mask=mask)

    cols = tl.arange(0, BC)
    within = cols < C
    weight = tl.load(weight_ptr + cols, mask=within, other=0.0).to(tl.float32)
    alpha = tl.load(alpha_ptr)
    for first in range(0, tl.minimum(tokens - start, BT).to(tl.int32), STEP):
        own = start + first + tl.arange(0, STEP)
        in_step = own < tokens
        live = in_step[:, None] & within[None, :]
        u = tl.zeros((STEP, BC), tl.float32)
        for j in tl.static_range(N):
            logit = alpha * tl.load(h_ptr + own * M + j, mask=in_step, other=0.0) + tl.load(bias_ptr + j)
            pre = tl.sigmoid(logit) + EPS
            tl.store(pre_ptr + own * N + j, pre, mask=in_step)
            if AGGREGATE:
                if GIVEN:
                    pre = tl.load(given_ptr + own * N + j, mask=in_step, other=0.0)
                x = tl.load(x_ptr + (own[:, None] * N + j) * C + cols[None, :], mask=live, other=0.0)
                u += pre[:, None] * x.to(tl.float32)
        if AGGREGATE:
            rstd = 1 / tl.sqrt(tl.sum(u * u, 1) / C + eps)
            tl.store(rstd_ptr + own, rstd, mask=in_step)
        else:
            u += tl.load(u_ptr + own[:, None] * C + cols[None, :], mask=live, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + own, mask=in_step, other=0.0)
        normed = (u * rstd[:, None] * weight[None, :]).to(u_ptr.dtype.element_ty)
        tl.store(u_ptr + own[:, None] * C + cols[None, :], normed, mask=live)


def _project_tile(n: int, raw: int, dtype: torch.dtype, combined: bool) -> dict[str, int]:
    """The largest tile whose accumulator, streams and part of `phi` stay in registers; `phi` is read for each."""
    columns = power_of_two(raw, LEAST_COLUMNS)
    if interpreted():
        return dict(BT=128, BC=64, MP=columns, G=n if n <= MOST_AT_ONCE else 1, num_warps=4, num_stages=3)
    if n <= MOST_AT_ONCE:
        rows, width = 64 if dtype == torch.bfloat16 else 32, 16 if combined and dtype != torch.float32 else 32
        return dict(BT=rows, BC=width, MP=columns, G=n, num_warps=4, num_stages=3)
    rows, width = (64, 32) if columns <= 128 else (32, 32) if columns <= 256 else (16, 16)
    return dict(BT=rows, BC=width, MP=columns, G=1, num_warps=4 if columns <= 64 else 8, num_stages=3)


def forward(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    weight: Tensor,
    num_iters: int,
    eps: float,
    sinkhorn_eps: float,
    *,
    combined: tuple[Tensor, Tensor, Tensor] | None = None,
    given: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`(streams, normed, pre, post, res, h, scale, rstd)` of contiguous `x [tokens, n, c]`.

    `combined`, of at most `MOST_AT_ONCE` streams, is `(output, post, res)` of the sub-layer before, whose combine then
    comes first; else `streams` is `x`. `given` is what aggregates in the place of `pre`.
    """
    tokens, n, c = x.shape
    raw = phi.shape[-1]
    wide = dict(dtype=torch.float32, device=x.device)
    h, scale, rstd = (torch.empty(tokens, *size, **wide) for size in ((raw,), (), ()))  # type: ignore[arg-type]
    pre, post, res = (torch.empty(tokens, *size, **wide) for size in ((n,), (n,), (n, n)))  # type: ignore[arg-type]
    normed = x.new_empty(tokens, c)
    tile = _project_tile(n, raw, x.dtype, combined is not None)
    at_once = tile["G"] == n
    mixed = torch.empty_like(x) if combined else x
    if not tokens:
        return mixed, normed, pre, post, res, h, scale, rstd
    with on_device(x):
        project_kernel[(blocks(tokens, tile["BT"]),)](
            x, *(combined or (None, None, None)), given, phi, mixed, normed, h, scale, rstd, tokens, eps,
            C=c, N=n, M=raw, **tile, COMBINE=combined is not None, GIVEN=given is not None and at_once,
        )  # fmt: skip
        width, p, bt = power_of_two(c), power_of_two(n), FINISHED_AT_ONCE
        step = 64 if interpreted() else min(bt, max(1, 4096 // width))
        finish_kernel[(blocks(tokens, bt),)](
            mixed, given, normed, h, alpha, bias, weight, pre, post, res, rstd, tokens, eps,
            C=c, N=n, BT=bt, STEP=step, BC=width, P=p, ITERS=num_iters, EPS=sinkhorn_eps,
            AGGREGATE=given is None or not at_once, GIVEN=given is not None,
            num_warps=warps(max(step * width * 2, bt * p * p)),
        )  # fmt: skip
    return mixed, normed, pre, post, res, h, scale, rstd
