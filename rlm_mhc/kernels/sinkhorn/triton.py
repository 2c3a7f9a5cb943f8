"""Sinkhorn-Knopp on tiles `[tokens, P, P]` inside Triton kernels, and the gradient of its iterations.

README.md beside this file derives both; P is a power of two of at least n, and what is beyond n takes no part. NaN in a
matrix makes all of its result NaN, as in the reference; `tl.max` drops NaN, which the sums after it bring back.
"""

import triton
import triton.language as tl

LIMIT = tl.constexpr(3.4028234663852886e38 / 4)


@triton.jit
def first_pair(logits, inside, EPS: tl.constexpr):
    """The outcome of the first columns, and that of the first rows."""
    log = tl.where(inside, tl.clamp(logits, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL), float("-inf"))
    largest = tl.max(log, 1)
    log = log - tl.where(largest == float("-inf"), 0.0, largest)[:, None, :]
    # One after the other: the sum would swallow the logarithm where the largest logit is huge.
    log = log - tl.log(_or_one(tl.sum(tl.exp(log), 1)))[:, None, :]
    columns = tl.exp(log)
    if EPS > 0:
        rows = tl.where(inside, columns + EPS, 0.0)
    else:
        largest = tl.max(log, 2)
        rows = tl.exp(log - tl.where(largest == float("-inf"), 0.0, largest)[:, :, None])
    rows = rows * (1 / (_or_one(tl.sum(rows, 2)) + EPS))[:, :, None]
    return columns, rows


@triton.jit
def _or_one(total):
    """The sum of a line, or 1 for a line of padding."""
    return tl.where(total == 0, 1.0, total)


@triton.jit
def sinkhorn(logits, inside, ITERS: tl.constexpr, EPS: tl.constexpr):
    """Columns divided by their sums, then rows by theirs, `ITERS` times."""
    _, m = first_pair(logits, inside, EPS)
    for _ in tl.static_range(ITERS - 1):
        m = m * (1 / (_or_one(tl.sum(m, 1)) + EPS))[:, None, :]
        m = m * (1 / (_or_one(tl.sum(m, 2)) + EPS))[:, :, None]
    return m


@triton.jit
def sinkhorn_backward(logits, cotangent, inside, ITERS: tl.constexpr, EPS: tl.constexpr):
    """The cotangent of the logits. Of each normalisation its sums alone are held, n numbers: they undo it again."""
    columns, m = first_pair(logits, inside, EPS)
    sums = ()
    for _ in tl.static_range(ITERS - 1):
        of_columns = _or_one(tl.sum(m, 1)) + EPS
        m = m * (1 / of_columns)[:, None, :]
        of_rows = _or_one(tl.sum(m, 2)) + EPS
        m = m * (1 / of_rows)[:, :, None]
        sums = sums + (of_columns, of_rows)
    g = tl.where(inside, cotangent, 0.0) * m
    for k in tl.static_range(ITERS - 1):
        g = g - m * tl.sum(g, 2)[:, :, None]
        m = m * sums[2 * (ITERS - 2 - k) + 1][:, :, None]
        g = g - m * tl.sum(g, 1)[:, None, :]
        m = m * sums[2 * (ITERS - 2 - k)][:, None, :]
    g = g - m * tl.sum(g, 2)[:, :, None]
    if EPS > 0:
        g = g * (columns / (columns + EPS))
    g = g - columns * tl.sum(g, 1)[:, None, :]
    return tl.where(inside & ~(tl.abs(logits) > LIMIT), g, 0.0)
