"""The Triton kernel of the last step of `mix_pre`'s backward: to the streams and to `phi`.

What is summed over tokens is summed as in `triton_backward.py`: the same bits in every run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlm_mhc.kernels.launch import on_device
from rlm_mhc.kernels.mix_post.triton import combine, load_entries, load_streams, mixed_stream
from rlm_mhc.kernels.mix_pre.tiling import apply_grid, apply_tile
from rlm_mhc.kernels.mix_pre.triton import load_phi
from rlm_mhc.kernels.mix_pre.triton_backward import Normed
from rlm_mhc.kernels.tiles import dot_wide


@triton.jit(do_not_specialize=["tokens"])
def apply_kernel(
    x_ptr,
    pre_ptr,
    phi_ptr,
    weight_ptr,
    rstd_ptr,
    g_ptr,
    mean_ptr,
    g_product_ptr,
    inner_ptr,
    more_ptr,
    res_ptr,
    out_ptr,
    g_phi_ptr,
    tokens,
    C: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    MB: tl.constexpr,
    G: tl.constexpr,
    MORE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The cotangent of `G` streams at some channels and, of the program's own tokens, that of `phi` there.

    Where `G` is all of them, `g` is the cotangent of the norm's output, else that of the aggregate already. With
    `MORE="add"` another cotangent of the streams is added, with `"mix"`, where `G` is all of them, another one by
    `resᵀ`. Programs whose third index is above 0 have further columns of `phi` and nothing else.
    """
    across: tl.constexpr = (C + BC - 1) // BC
    first = tl.program_id(0) // across * G
    cols = tl.program_id(0) % across * BC + tl.arange(0, BC)
    split, part = tl.program_id(1), tl.program_id(2)
    within = cols < C
    columns = part * MB + tl.arange(0, MB)
    g_phi = ()
    for _ in tl.static_range(G):
        g_phi = g_phi + (tl.zeros((BC, MB), tl.float32),)
    # Where the rows of `phi` stay in registers, they are read once, not for each block of tokens.
    HELD: tl.constexpr = G == N and M <= MB
    if HELD:
        phis = ()
        for j in tl.static_range(G):
            phis = phis + (load_phi(phi_ptr, (first + j) * C + cols, within, 0, M, MB),)
    count = tl.cdiv(tokens, BT)
    for number in range(split, count, tl.num_programs(1)):
        # From the last token to the first: what the kernel before has read last may still be in the cache.
        t = (count - 1 - number) * BT + tl.arange(0, BT).to(tl.int64)
        in_range = t < tokens
        live = in_range[:, None] & within[None, :]
        row = t[:, None] * C + cols[None, :]
        xs = load_streams(x_ptr, t, cols, live, first, C, N, G)
        product = t[:, None] * M + columns[None, :]
        g_product = tl.load(g_product_ptr + product, mask=in_range[:, None] & (columns < M)[None, :], other=0.0)
        summed = ()
        for j in tl.static_range(G):
            summed = summed + (dot_wide(tl.trans(xs[j]), g_product, g_phi[j]),)
        g_phi = summed
        if part == 0:
            pre = load_entries(pre_ptr, t, in_range, first, 1, G, N)
            g_u = tl.load(g_ptr + row, mask=live, other=0.0).to(tl.float32)
            if G == N:
                u = mixed_stream(xs, pre, 0, N)
                rstd = tl.load(rstd_ptr + t, mask=in_range, other=0.0)[:, None]
                mean = tl.load(mean_ptr + t, mask=in_range, other=0.0)[:, None]
                weight = tl.load(weight_ptr + cols, mask=within, other=0.0).to(tl.float32)
                g_u = rstd * (g_u * weight[None, :] - u * rstd * mean)
            inner = tl.load(inner_ptr + t, mask=in_range, other=0.0)
            if MORE != "":
                more = load_streams(more_ptr, t, cols, live, first, C, N, G)
            for j in tl.static_range(G):
                g = pre[j][:, None] * g_u - inner[:, None] * xs[j].to(tl.float32)
                if MORE == "add":
                    g += more[j].to(tl.float32)
                if MORE == "mix":
                    g += mixed_stream(more, load_entries(res_ptr, t, in_range, j, N, N, N * N), 0, N)
                if HELD:
                    g = tl.dot(g_product, tl.trans(phis[j]), g, input_precision=PRECISION)
                else:
                    g = through_phi(
                        g, g_product_ptr, phi_ptr, t, in_range, (first + j) * C + cols, within, M, MB, PRECISION
                    )
                at = (t[:, None] * N + first + j) * C + cols[None, :]
                tl.store(out_ptr + at, g.to(out_ptr.dtype.element_ty), mask=live)
    for j in tl.static_range(G):
        at = (split * N * C + (first + j) * C + cols)[:, None] * M + columns[None, :]
        tl.store(g_phi_ptr + at, g_phi[j], mask=within[:, None] & (columns < M)[None, :])


@triton.jit
def through_phi(
    g, g_product_ptr, phi_ptr, t, in_range, channels, within, M: tl.constexpr, MB: tl.constexpr, PRECISION: tl.constexpr
):
    """`g + g_product · phiᵀ` at some channels of a stream."""
    for m in range(0, M, MB):
        columns = m + tl.arange(0, MB)
        mask = in_range[:, None] & (columns < M)[None, :]
        g_product = tl.load(g_product_ptr + t[:, None] * M + columns[None, :], mask=mask, other=0.0)
        phi = load_phi(phi_ptr, channels, within, m, M, MB)
        g = tl.dot(g_product, tl.trans(phi), g, input_precision=PRECISION)
    return g


def to_streams(
    x: Tensor,
    pre: Tensor,
    phi: Tensor,
    normed: Normed,
    g_product: Tensor,
    inner: Tensor,
    more: Tensor | None,
    res: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The cotangents of the streams and of `phi`; `more` is another one of the streams, with `res` by `resᵀ`."""
    tokens, n, c = x.shape
    raw = phi.shape[-1]
    tile = apply_tile(n, raw, x.dtype)
    if more is not None and res is not None and tile["G"] < n:
        more, res = combine(more, None, None, res, transposed=True), None
    out = torch.empty_like(x)
    grid = apply_grid(n, c, raw, tokens, tile)
    partial = phi.new_empty(grid[1], n * c, raw)
    half = x.dtype != torch.float32
    options: dict[str, Any] = dict(MORE="" if more is None else "add" if res is None else "mix")
    with on_device(x):
        apply_kernel[grid](
            x, pre, phi, *normed, g_product, inner, more, res, out, partial, tokens, C=c, N=n, M=raw, **tile,
            **options, PRECISION="tf32" if half else "ieee",
        )  # fmt: skip
    return out, partial.sum(0)
