"""One transformer block: attention and MLP, each inside a hyper-connection or a plain residual."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.attention import self_attention
from rlm_mhc.fn.kernels import REFERENCE, Kernels
from rlm_mhc.fn.mhc import EarlyPre
from rlm_mhc.params import Layer, MHCParams
from rlm_mhc.types import RotaryTable


class BlockOutput(NamedTuple):
    """`hidden`: what came out of the block, of the form of what went in; `res`: the residual
    mappings of its attention and MLP, each `[*b, s, n, n]` (without mHC none)."""

    hidden: Any
    res: tuple[Tensor, ...]


def block(
    params: Layer,
    hidden: Any,
    cos: RotaryTable,
    sin: RotaryTable,
    config: ModelConfig,
    kernels: Kernels = REFERENCE,
) -> BlockOutput:
    """Pre-norm attention, then pre-norm SwiGLU, around streams `[*b, s, n, c]` (without mHC `[*b, s, c]`; with the
    preset `single_pass` an `EarlyPre`).

    >>> import torch; from rlm_mhc import fn
    >>> config = ModelConfig.preset("tiny")
    >>> streams = torch.randn(1, 7, config.mhc_flows, config.hidden_dim)
    >>> fn.block(fn.init(config).layers[0], streams, *fn.rotary_table(torch.arange(7), 32), config).hidden.shape
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
    hidden: Any,
    branch: Callable[[Tensor], Tensor],
    config: ModelConfig,
    kernels: Kernels = REFERENCE,
) -> tuple[Any, tuple[Any, ...]]:
    """A sub-layer inside its hyper-connection, and the `res` it used; for `params=()` the residual `x + branch(x)`.

    Where a function stands in for the weights, `params(hidden, branch)`, whose `res` is not told.

    >>> import torch
    >>> hyper_connection((), torch.tensor([2.0]), lambda x: 10 * x, ModelConfig())
    (tensor([22.]), ())
    """
    if callable(params):
        return params(hidden, branch), ()
    if not isinstance(params, MHCParams):
        return hidden + branch(hidden), ()
    streams, early = hidden if isinstance(hidden, EarlyPre) else (hidden, None)
    pre, post, res = kernels.mhc_mappings(params, streams, **config.mhc_options)
    output = branch(kernels.mhc_aggregate(streams, pre if early is None else early))
    mixed = kernels.mhc_combine(streams, output, post, res)
    return mixed if early is None else EarlyPre(mixed, pre), (res,)
