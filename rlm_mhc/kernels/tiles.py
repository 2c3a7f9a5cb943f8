"""Matrix products of tiles, as exact as fp32 whatever the dtype of the streams. Imports triton."""

import triton
import triton.language as tl

from rlm_mhc.kernels.launch import interpreted

# The interpreter holds bf16 as integers and multiplies those: there, tiles are widened first.
WIDEN = tl.constexpr(interpreted())


@triton.jit
def dot(a, b, total):
    """`total + a · b` for tiles of the same dtype; products are exact and summed in fp32."""
    if WIDEN:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def dot_wide(a, b, total):
    """`total + a · b` for `a` of the streams' dtype and `b` in fp32, none of whose bits are lost.

    bf16: `b` is the sum of three bf16 numbers, each product exact. fp16: `a` is a TF32 number, and `b` the sum of two
    to 2^-22. fp32: no tensor cores.
    """
    if a.dtype == tl.bfloat16:
        high = b.to(tl.bfloat16)
        rest = b - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        total = dot(a, low, total)
        total = dot(a, middle, total)
        total = dot(a, high, total)
    elif a.dtype == tl.float16:
        total = tl.dot(a.to(tl.float32), b, total, input_precision="tf32x3")
    else:
        total = tl.dot(a, b, total, input_precision="ieee")
    return total
