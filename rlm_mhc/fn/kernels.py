"""The operations that a model is made of, as an argument: swap one without touching the model."""

from collections.abc import Callable
from typing import NamedTuple

from rlm_mhc.fn.attention import causal_attention
from rlm_mhc.fn.mhc import mhc_aggregate, mhc_combine, mhc_mappings
from rlm_mhc.fn.mlp import swiglu
from rlm_mhc.fn.norm import rms_norm


class Mixing(NamedTuple):
    """The mixing of sub-layers in few passes over the streams, the norm before a sub-layer included.

    `weights` are `(phi, alpha, bias, weight)`, the last one that norm's; `given` is None or, where `pre` comes early,
    what aggregates; `combined` is None or the `(output, post, res)` by which the streams are combined first. `mapped`
    begins with `normed, pre, post, res` and goes on with what the backward needs.

    - `settings(config)`, passed on to the rest; a ValueError for a config that this mixing does not serve
    - `pre(streams, weights, settings, given) -> (normed, pre, post, res)`
    - `post_pre(streams, *combined, weights, settings, given) -> (streams, normed, pre, post, res)`
    - `post(streams, output, post, res) -> streams`; these three are differentiable, the others are not
    - `forward(streams, weights, settings, given, combined) -> (streams, mapped)`
    - `backward(streams, weights, settings, given, mapped, cotangents, more, res) -> (streams, weights, given)`, all
      cotangents; `cotangents` are those of `normed, pre, post, res`, that of `pre` None where nothing reads it;
      `more` is the cotangent of the streams which `res` made of these
    - `reduce(streams, output, post, cotangent) -> (output, post, res)`, the cotangents of the combine without streams
    - `scratch(config, state)`, the most bytes that a backward works with beside tensors of one stream; all of them
      take `state`
    """

    settings: Callable
    pre: Callable
    post_pre: Callable
    post: Callable
    forward: Callable
    backward: Callable
    reduce: Callable
    scratch: Callable


class Kernels(NamedTuple):
    """Functions with the signatures of their namesakes in `rlm_mhc.fn`.

    With `mixing` a block of the model is mixed by that, and by none of `mhc_mappings`, `mhc_aggregate`, `mhc_combine`
    and the `rms_norm` before a sub-layer.

    >>> REFERENCE._replace(attention=lambda q, k, v: v).attention(0, 0, 1)
    1
    """

    rms_norm: Callable = rms_norm
    attention: Callable = causal_attention
    swiglu: Callable = swiglu
    mhc_mappings: Callable = mhc_mappings
    mhc_aggregate: Callable = mhc_aggregate
    mhc_combine: Callable = mhc_combine
    mixing: Mixing | None = None


REFERENCE = Kernels()
