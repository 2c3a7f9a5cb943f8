"""The operations that a model is made of, as an argument: swap one without touching the model."""

from collections.abc import Callable
from typing import NamedTuple

from rlm_mhc.fn.attention import causal_attention
from rlm_mhc.fn.mhc import mhc_aggregate, mhc_combine, mhc_mappings
from rlm_mhc.fn.mlp import swiglu
from rlm_mhc.fn.norm import rms_norm


class Kernels(NamedTuple):
    """Functions with the signatures of their namesakes in `rlm_mhc.fn`.

    With `block`, a function as `fn.block`, that runs each block of a model with mHC, with `rms_norm`, `attention` and
    `swiglu` of these kernels as it likes.

    >>> REFERENCE._replace(attention=lambda q, k, v: v).attention(0, 0, 1)
    1
    """

    rms_norm: Callable = rms_norm
    attention: Callable = causal_attention
    swiglu: Callable = swiglu
    mhc_mappings: Callable = mhc_mappings
    mhc_aggregate: Callable = mhc_aggregate
    mhc_combine: Callable = mhc_combine
    block: Callable | None = None


REFERENCE = Kernels()
