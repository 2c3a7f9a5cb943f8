"""One transformer block: attention and MLP, each inside a hyper-connection or a plain residual."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.attention import Attend, Attended, self_attention
from rlm_mhc.fn.attention import attend as attend_sequence
from rlm_mhc.fn.context import Context
from rlm_mhc.fn.kernels import REFERENCE, Kernels
from rlm_mhc.fn.mhc import Hidden
from rlm_mhc.fn.mlp import mlp
from rlm_mhc.fn.norm import norm
from rlm_mhc.fn.replaceable import replaceable
from rlm_mhc.params import Layer, MHCParams


class BlockOutput(NamedTuple):
    """`hidden`: the state after the block; `res`: the residual mappings of its attention and MLP, each
    `[*b, s, n, n]` (without mHC none); `cache`: what `attend` returned there."""

    hidden: Hidden
    res: tuple[Tensor, ...]
    cache: Any = ()


class HyperOutput(NamedTuple):
    """`hidden`: the state after a sub-layer; `res`: its residual mapping, if there is one; `aux`: what the branch
    returned beside its output."""

    hidden: Hidden
    res: tuple[Tensor, ...]
    aux: Any = ()


def block(
    params: Layer,
    hidden: Hidden,
    context: Context,
    config: ModelConfig,
    kernels: Kernels = REFERENCE,
    cache: Any = (),
    attend: Attend | None = None,
) -> BlockOutput:
    """Pre-norm attention, then pre-norm SwiGLU, around streams `[*b, s, n, c]` (without mHC `[*b, s, c]`).

    Args:
        params: the weights of one layer.
        hidden: the state before the block.
        context: where the tokens stand.
        config: the model's shape.
        kernels: the operations to run it with.
        cache: the layer's own, handed to `attend`.
        attend: how the layer attends; None: within the sequence, by `kernels.attention`.

    >>> import torch; from rlm_mhc import fn
    >>> config = ModelConfig.preset("tiny")
    >>> hidden = fn.Hidden(torch.randn(1, 7, config.mhc_flows, config.hidden_dim))
    >>> context = fn.positions(torch.zeros(1, 7, dtype=torch.int64), config)
    >>> fn.block(fn.init(config).layers[0], hidden, context, config).hidden.x.shape
    torch.Size([1, 7, 4, 128])
    """
    attend = attend or partial(attend_sequence, attention=kernels.attention)
    if kernels.block is not None and config.mhc_enabled:
        return kernels.block(params, hidden, context, config, kernels, cache, attend)
    attention = partial(_attention, params, context, cache, attend, config.norm_eps, kernels)
    feed_forward = partial(_mlp, params, config.norm_eps, kernels)
    hidden, attn_res, cache = hyper_connection(params.attn_mhc, hidden, attention, config, kernels, has_aux=True)
    hidden, mlp_res, _ = hyper_connection(params.mlp_mhc, hidden, feed_forward, config, kernels)
    return BlockOutput(hidden, attn_res + mlp_res, cache)


def _attention(
    params: Layer,
    context: Context,
    cache: Any,
    attend: Attend,
    eps: float,
    kernels: Kernels,
    u: Float[Tensor, "*b s c"],
) -> Attended:
    normalise = partial(kernels.rms_norm, eps=eps)
    normed = norm(params.input_layernorm, u, normalise)
    return self_attention(params.self_attn, normed, context, cache, attend, normalise)


def _mlp(params: Layer, eps: float, kernels: Kernels, u: Float[Tensor, "*b s c"]) -> Float[Tensor, "*b s c"]:
    normed = norm(params.post_attention_layernorm, u, partial(kernels.rms_norm, eps=eps))
    return mlp(params.mlp, normed, kernels.swiglu)


def hyper_connection(
    params: MHCParams | Callable[..., Any] | tuple[()],
    hidden: Hidden,
    branch: Callable[[Tensor], Any],
    config: ModelConfig,
    kernels: Kernels = REFERENCE,
    *,
    has_aux: bool = False,
) -> HyperOutput:
    """A sub-layer inside its hyper-connection; for `params=()` the residual `x + branch(x)`.

    If `params` is callable (see `replaceable`), `params(streams, branch, has_aux)`, or of a `Hidden` where `pre` comes
    early, returns the state after it, with `has_aux` a pair of it and `aux`; then there is no `res`.

    Args:
        params: the weights, or a function that replaces them.
        hidden: the state before the sub-layer.
        branch: `[*b, c] -> [*b, c]`; with `has_aux` it returns `(output, aux)`.
        config: the model's shape.
        kernels: the operations to run it with.
        has_aux: see `branch`.

    >>> import torch
    >>> hyper_connection((), Hidden(torch.tensor([2.0])), lambda x: 10 * x, ModelConfig())
    HyperOutput(hidden=Hidden(x=tensor([22.]), pre=()), res=(), aux=())
    """
    state = hidden if isinstance(hidden.pre, Tensor) else hidden.x
    found = _mixed(params, state, branch, has_aux, config, kernels)
    if isinstance(found, HyperOutput):
        return found
    after, aux = found if has_aux else (found, ())
    return HyperOutput(after if isinstance(after, Hidden) else Hidden(after), (), aux)


@replaceable(3)
def _mixed(
    params: MHCParams | tuple[()],
    state: Tensor | Hidden,
    branch: Callable[[Tensor], Any],
    has_aux: bool,
    config: ModelConfig,
    kernels: Kernels,
) -> HyperOutput:
    x, pre_in = state if isinstance(state, Hidden) else Hidden(state)
    run = branch if has_aux else partial(_without_aux, branch)
    if not isinstance(params, MHCParams):
        output, aux = run(x)
        return HyperOutput(Hidden(x + output), (), aux)
    pre, post, res = kernels.mhc_mappings(params, x, **config.mhc_options)
    early = isinstance(pre_in, Tensor)
    output, aux = run(kernels.mhc_aggregate(x, pre_in if early else pre))
    return HyperOutput(Hidden(kernels.mhc_combine(x, output, post, res), pre if early else ()), (res,), aux)


def _without_aux(branch: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, tuple[()]]:
    return branch(x), ()
