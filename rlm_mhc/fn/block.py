"""One transformer block: attention and MLP, each inside a hyper-connection or a plain residual."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.attention import self_attention
from rlm_mhc.fn.kernels import REFERENCE, Kernels
from rlm_mhc.fn.mhc import Hidden
from rlm_mhc.params import Layer, MHCParams
from rlm_mhc.types import RotaryTable


class BlockOutput(NamedTuple):
    """`hidden`: the state after the block; `res`: the residual mappings of its attention and MLP, each
    `[*b, s, n, n]` (without mHC none)."""

    hidden: Hidden
    res: tuple[Tensor, ...]


def block(
    params: Layer,
    hidden: Hidden,
    cos: RotaryTable,
    sin: RotaryTable,
    config: ModelConfig,
    kernels: Kernels = REFERENCE,
) -> BlockOutput:
    """Pre-norm attention, then pre-norm SwiGLU, around streams `[*b, s, n, c]` (without mHC `[*b, s, c]`).

    >>> import torch; from rlm_mhc import fn
    >>> config = ModelConfig.preset("tiny")
    >>> hidden = fn.Hidden(torch.randn(1, 7, config.mhc_flows, config.hidden_dim))
    >>> fn.block(fn.init(config).layers[0], hidden, *fn.rotary_table(torch.arange(7), 32), config).hidden.x.shape
    torch.Size([1, 7, 4, 128])
    """
    if kernels.block is not None and config.mhc_enabled:
        return kernels.block(params, hidden, cos, sin, config, kernels)
    attention = partial(_attention, params, cos, sin, config.norm_eps, kernels)
    mlp = partial(_mlp, params, config.norm_eps, kernels)
    hidden, attn_res = hyper_connection(params.attn_mhc, hidden, attention, config, kernels)
    hidden, mlp_res = hyper_connection(params.mlp_mhc, hidden, mlp, config, kernels)
    return BlockOutput(hidden, attn_res + mlp_res)


def _attention(
    params: Layer, cos: RotaryTable, sin: RotaryTable, eps: float, kernels: Kernels, u: Float[Tensor, "*b s c"]
) -> Float[Tensor, "*b s c"]:
    norm = partial(kernels.rms_norm, eps=eps)
    normed = norm(u, params.input_layernorm.weight)
    return self_attention(params.self_attn, normed, cos, sin, kernels.attention, norm)


def _mlp(params: Layer, eps: float, kernels: Kernels, u: Float[Tensor, "*b s c"]) -> Float[Tensor, "*b s c"]:
    return kernels.swiglu(params.mlp, kernels.rms_norm(u, params.post_attention_layernorm.weight, eps))


def hyper_connection(
    params: MHCParams | Callable[..., Any] | tuple[()],
    hidden: Hidden,
    branch: Callable[[Tensor], Tensor],
    config: ModelConfig,
    kernels: Kernels = REFERENCE,
) -> tuple[Hidden, tuple[Tensor, ...]]:
    """A sub-layer inside its hyper-connection, and the `res` it used; for `params=()` the residual `x + branch(x)`.

    If `params` is callable, it is applied as `params(streams, branch)`, or `params(hidden, branch)` where `pre` comes
    early, and no `res` is returned.

    >>> import torch
    >>> hyper_connection((), Hidden(torch.tensor([2.0])), lambda x: 10 * x, ModelConfig())
    (Hidden(x=tensor([22.]), pre=()), ())
    """
    x, given = hidden
    early = isinstance(given, Tensor)
    if callable(params):
        after = params(hidden if early else x, branch)
        return after if early else Hidden(after), ()
    if not isinstance(params, MHCParams):
        return Hidden(x + branch(x)), ()
    pre, post, res = kernels.mhc_mappings(params, x, **config.mhc_options)
    output = branch(kernels.mhc_aggregate(x, given if isinstance(given, Tensor) else pre))
    return Hidden(kernels.mhc_combine(x, output, post, res), pre if early else ()), (res,)
