"""Triton kernels of `mix_post`: the combine, its transpose, and the sums over the width that its backward needs.

Every offset that grows with the tokens is computed in 64 bits. `tokens` is never a constant of a kernel.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlm_mhc.kernels.launch import blocks, interpreted, on_device, power_of_two, warps
from rlm_mhc.kernels.tiles import dot


@triton.jit
def load_streams(x_ptr, t, cols, live, first, C: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    """The tiles `[tokens, columns]` of `G` streams from the `first` on, as they are stored."""
    xs = ()
    for j in tl.static_range(G):
        at = x_ptr + (t[:, None] * N + (first + j)) * C + cols[None, :]
        xs = xs + (tl.load(at, mask=live, other=0.0),)
    return xs


@triton.jit
def load_entries(ptr, t, in_range, first, STEP: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Of the `SIZE` numbers of each token every `STEP`-th from the `first` on, `COUNT` of them."""
    entries = ()
    for k in tl.static_range(COUNT):
        entries = entries + (tl.load(ptr + t * SIZE + first + k * STEP, mask=in_range, other=0.0),)
    return entries


@triton.jit
def mixed_stream(xs, entries, first: tl.constexpr, N: tl.constexpr):
    """`Σ_j entries[first + j] · xs[j]` in fp32."""
    total = tl.zeros(xs[0].shape, tl.float32)
    for j in tl.static_range(N):
        total += entries[first + j][:, None] * xs[j].to(tl.float32)
    return total


@triton.jit(do_not_specialize=["tokens"])
def combine_kernel(
    x_ptr,
    y_ptr,
    post_ptr,
    res_ptr,
    out_ptr,
    tokens,
    C: tl.constexpr,
    N: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    OUTPUT: tl.constexpr,
):
    """`out[i] = Σ_j res[i, j] · x[j] + post[i] · y`; without `OUTPUT` the sum alone."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    in_range = t < tokens
    live = in_range[:, None] & (cols < C)[None, :]
    xs = load_streams(x_ptr, t, cols, live, 0, C, N, N)
    if OUTPUT:
        y = tl.load(y_ptr + t[:, None] * C + cols[None, :], mask=live, other=0.0).to(tl.float32)
    # With many streams, a body for each of them takes long to compile.
    for i in tl.range(0, N, num_stages=1, loop_unroll_factor=N if N <= 8 else 1):
        first = i if TRANSPOSED else i * N
        row = load_entries(res_ptr, t, in_range, first, N if TRANSPOSED else 1, N, N * N)
        mixed = mixed_stream(xs, row, 0, N)
        if OUTPUT:
            mixed += tl.load(post_ptr + t * N + i, mask=in_range, other=0.0)[:, None] * y
        at = out_ptr + (t[:, None] * N + i) * C + cols[None, :]
        tl.store(at, mixed.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["tokens"])
def reduce_kernel(
    x_ptr,
    y_ptr,
    post_ptr,
    res_ptr,
    g_ptr,
    g_x_ptr,
    g_y_ptr,
    g_post_ptr,
    g_res_ptr,
    tokens,
    C: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    BC: tl.constexpr,
    BT: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """`g_res[i, j] = Σ_c g[i] · x[j]`, `g_post[i] = Σ_c g[i] · y`, `g_y = Σ_i post[i] · g[i]`, and with `SPREAD`
    `g_x[j] = Σ_i res[i, j] · g[i]`.

    The rows of a tile are the streams of `R // N` tokens: their products with each other are one matrix product, of
    which the blocks on the diagonal, one of each token, are kept.
    """
    first = tl.program_id(0).to(tl.int64) * (R // N)
    row = tl.arange(0, R)
    t = first + row // N
    row_live = (row < R // N * N) & (t < tokens)
    own = first + tl.arange(0, BT)
    own_live = (tl.arange(0, BT) < R // N) & (own < tokens)
    products = tl.zeros((R, R), tl.float32)
    with_y = tl.zeros((R, BC), tl.float32)
    for start in range(0, C, BC):
        cols = start + tl.arange(0, BC)
        live = row_live[:, None] & (cols < C)[None, :]
        at = (first * N + row)[:, None] * C + cols[None, :]
        g = tl.load(g_ptr + at, mask=live, other=0.0)
        x = tl.load(x_ptr + at, mask=live, other=0.0)
        y = tl.load(y_ptr + t[:, None] * C + cols[None, :], mask=live, other=0.0)
        products = dot(g, tl.trans(x), products)
        with_y += g.to(tl.float32) * y.to(tl.float32)
        live = own_live[:, None] & (cols < C)[None, :]
        gs = load_streams(g_ptr, own, cols, live, 0, C, N, N)
        g_y = mixed_stream(gs, load_entries(post_ptr, own, own_live, 0, 1, N, N), 0, N)
        tl.store(g_y_ptr + own[:, None] * C + cols[None, :], g_y.to(g_y_ptr.dtype.element_ty), mask=live)
        if SPREAD:
            for j in tl.static_range(N):
                column = load_entries(res_ptr, own, own_live, j, N, N, N * N)
                g_x = mixed_stream(gs, column, 0, N)
                g_x_at = g_x_ptr + (own[:, None] * N + j) * C + cols[None, :]
                tl.store(g_x_at, g_x.to(g_x_ptr.dtype.element_ty), mask=live)
    tl.store(g_post_ptr + first * N + row, tl.sum(with_y, 1), mask=row_live)
    same = row_live[:, None] & (row // N == (row // N)[:, None])
    at = g_res_ptr + (first * N + row)[:, None] * N + (row % N)[None, :]
    tl.store(at, products, mask=same)


def tile(n: int, c: int) -> tuple[int, int]:
    """Tokens and columns of a tile that holds all `n` streams of each."""
    columns = min(power_of_two(c), 128)
    return max(1, (65536 if interpreted() else 8192) // (columns * power_of_two(n))), columns


def _reduce_tile(n: int, c: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows of the matrix product that holds the n × n products of `R // n` tokens, and the columns of a step.

    16 rows of each warp: with fewer, warps compute the same (H200, bf16, n = 4, c = 2048: 0.18 ms with 64 rows, 0.38
    with 16). In fp32, without tensor cores, what is computed beside the blocks on the diagonal costs more.
    """
    rows, columns = (128, 256) if interpreted() else (16, 256) if dtype == torch.float32 else (64, 128)
    return dict(R=rows, BC=min(power_of_two(c), columns), BT=power_of_two(rows // n), num_warps=4, num_stages=3)


def combine(x: Tensor, y: Tensor | None, post: Tensor | None, res: Tensor, transposed: bool = False) -> Tensor:
    """`out[i] = Σ_j res[i, j] · x[j] + post[i] · y` of contiguous `x [tokens, n, c]`."""
    tokens, n, c = x.shape
    out = torch.empty_like(x)
    bt, bc = tile(n, c)
    options: dict[str, Any] = dict(C=c, N=n, BT=bt, BC=bc, TRANSPOSED=transposed, OUTPUT=y is not None)
    if tokens:
        with on_device(x):
            grid = (blocks(tokens, bt), blocks(c, bc))
            combine_kernel[grid](x, y, post, res, out, tokens, **options, num_warps=warps(bt * bc * n))
    return out


def reduce(x: Tensor, y: Tensor, post: Tensor, g: Tensor, res: Tensor | None = None) -> tuple[Tensor, ...]:
    """The cotangents of `y`, `post` and `res`, from that of the combined streams; with `res` first that of `x`."""
    tokens, n, c = x.shape
    out = torch.empty_like(y), torch.empty_like(post), post.new_empty(tokens, n, n)
    g_x = None if res is None else torch.empty_like(x)
    options = _reduce_tile(n, c, x.dtype)
    rows = options["R"]
    if tokens:
        with on_device(x):
            grid = (blocks(tokens, rows // n),)
            reduce_kernel[grid](x, y, post, res, g, g_x, *out, tokens, C=c, N=n, **options, SPREAD=res is not None)
    return out if g_x is None else (g_x, *out)
