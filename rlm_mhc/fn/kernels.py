"""The operations that a model is made of, as an argument: swap one without touching the model."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from rlm_mhc.fn.attention import causal_attention
from rlm_mhc.fn.mhc import mhc_aggregate, mhc_combine, mhc_mappings
from rlm_mhc.fn.mlp import swiglu
from rlm_mhc.fn.norm import rms_norm


@dataclasses.dataclass(frozen=True)
class Differentiable:
    """A function together with both halves of its derivative, for a program that keeps what lies between them.

    `forward(*inputs) -> (output, saved)`; `backward(inputs, saved, cotangent) -> cotangents of the inputs`. Called,
    it is `function(*inputs)`.

    >>> square = Differentiable(lambda x: x * x, lambda x: (x * x, ()), lambda inputs, saved, g: (2 * inputs[0] * g,))
    >>> square(3), square.backward((3,), (), 1)
    (9, (6,))
    """

    function: Callable[..., Any]
    forward: Callable[..., tuple[Any, Any]]
    backward: Callable[[Any, Any, Any], Any]

    def __call__(self, *inputs: Any) -> Any:
        """`function(*inputs)`."""
        return self.function(*inputs)


class Kernels(NamedTuple):
    """Functions with the signatures of their namesakes in `rlm_mhc.fn`.

    >>> REFERENCE._replace(attention=lambda q, k, v: v).attention(0, 0, 1)
    1
    """

    rms_norm: Callable = rms_norm
    attention: Callable = causal_attention
    swiglu: Callable = swiglu
    mhc_mappings: Callable = mhc_mappings
    mhc_aggregate: Callable = mhc_aggregate
    mhc_combine: Callable = mhc_combine


REFERENCE = Kernels()
