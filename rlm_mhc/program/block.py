"""One transformer block as a stage, cut so that each stage ends in a matrix product.

    mappings, aggregate, norm, q/k/v products, rotation | attention | output product, combine
    mappings, aggregate, norm, gate/up products | SwiGLU, down product, combine

What is kept of a block is the input of each stage. The backward of a stage that ends in a product does not run that
product again, so with `remat="none"` no product with a weight and no attention is computed twice.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.attention import heads
from rlm_mhc.fn.kernels import Kernels
from rlm_mhc.fn.mhc import Hidden
from rlm_mhc.fn.mlp import swiglu
from rlm_mhc.params import MLP, Linear, weight_table
from rlm_mhc.program.hyper import hyper
from rlm_mhc.stage import Grads, Stage, Weights, bring_stage, chain, residual, stage, stage_of
from rlm_mhc.stage.attention import attention_stage
from rlm_mhc.stage.block import BlockResiduals, Site, block_of
from rlm_mhc.tree import named_leaves, rebuild

SITES = (("attn_mhc", "input_layernorm.weight"), ("mlp_mhc", "post_attention_layernorm.weight"))


class Prelude(NamedTuple):
    """What a sub-layer does first: `run(*weights, u)`, and the names of these weights."""

    run: Callable[..., Tensor]
    names: tuple[str, ...]


def block_stage(config: ModelConfig, kernels: Kernels, *, keep_streams: bool = True) -> Stage:
    """`hidden -> hidden` of one layer, its weights under their names in `Layer`, with `cos` and `sin` beside them.

    It keeps the input of every inner stage, with `keep_streams=False` all but the streams between its two halves.
    With `kernels.block` it is the stage that this brings.
    """
    builder = stage_of(kernels.block) if config.mhc_enabled and kernels.block else None
    preludes = [_prelude(config, kernels, norm, normed=builder is not None) for _, norm in SITES]
    branches = [part(config, kernels, prelude) for part, prelude in zip((_attention, _mlp), preludes, strict=True)]
    if builder:
        first, second = (Site(site, norm, branch) for (site, norm), branch in zip(SITES, branches, strict=True))
        return builder.build(first, second, config, keep_streams)
    if config.mhc_enabled:
        parts = [hyper(site, branch, config, kernels) for (site, _), branch in zip(SITES, branches, strict=True)]
    else:
        parts = [_on_hidden(residual(branch)) for branch in branches]
    attention, mlp = parts
    return block_of(attention, mlp, keep_streams)


def _on_hidden(s: Stage) -> Stage:
    """A stage of `x` as one of the state between sub-layers without mHC."""

    def forward(weights: Weights, hidden: Hidden) -> tuple[Hidden, Any]:
        x, kept = s.forward(weights, hidden.x)
        return Hidden(x), kept

    def backward(weights: Weights, hidden: Hidden, kept: Any, cotangent: Hidden) -> tuple[Grads, Hidden]:
        grads, g_x = s.backward(weights, hidden.x, kept, cotangent.x)
        return grads, Hidden(g_x)

    return Stage(forward, backward)


def _prelude(config: ModelConfig, kernels: Kernels, norm: str, normed: bool) -> Prelude:
    """The norm before a sub-layer; with `normed` nothing, its input being normed already."""
    if normed:
        return Prelude(lambda u: u, ())
    return Prelude(lambda scale, u: kernels.rms_norm(u, scale, config.norm_eps), (norm,))


def _attention(config: ModelConfig, kernels: Kernels, prelude: Prelude) -> Stage:
    norm = partial(kernels.rms_norm, eps=config.norm_eps)
    before = weight_table(config).layers[0].self_attn._replace(o_proj=())
    names = [f"self_attn.{name}" for name in named_leaves(before)]
    first = len(prelude.names)

    def project(*rest: Tensor) -> Any:
        *weights, cos, sin, u = rest
        x = prelude.run(*weights[:first], u)
        return heads(rebuild(before, iter(weights[first:])), x, cos, sin, norm)

    def merge(o: Tensor, heads: Tensor) -> Tensor:
        return F.linear(rearrange(heads, "... h s d -> ... s (h d)"), o)

    return chain(
        stage(project, *prelude.names, *names, constants=("cos", "sin")),
        attention_stage(kernels.attention),
        stage(merge, "self_attn.o_proj.weight"),
    )


def _mlp(config: ModelConfig, kernels: Kernels, prelude: Prelude) -> Stage:
    names = tuple(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
    if build := stage_of(kernels.swiglu):
        return build(prelude, names)
    first = len(prelude.names)

    def whole(*rest: Tensor) -> Tensor:
        *weights, u = rest
        return kernels.swiglu(MLP(*map(Linear, weights[first:])), prelude.run(*weights[:first], u))

    return stage(whole, *prelude.names, *names)


def _swiglu_stage(prelude: Prelude, names: tuple[str, str, str]) -> Stage:
    """The stage that `fn.swiglu` brings: no product is computed again in its backward."""
    *of_input, down = names

    def gate_and_up(*rest: Tensor) -> tuple[Tensor, Tensor]:
        *scale, gate, up, u = rest
        x = prelude.run(*scale, u)
        return F.linear(x, gate), F.linear(x, up)

    def narrow(down: Tensor, inner: tuple[Tensor, Tensor]) -> Tensor:
        gate, up = inner
        # silu written out: its derivative then reads the same sigmoid, where that of F.silu computes another.
        return F.linear(gate * torch.sigmoid(gate) * up, down)

    return chain(stage(gate_and_up, *prelude.names, *of_input), stage(narrow, down))


bring_stage(swiglu, _swiglu_stage)


def residual_mappings(residuals: BlockResiduals, config: ModelConfig) -> tuple[Tensor, ...]:
    """Return `res` of the block's two sub-layers."""
    return (residuals.attention.mappings.res, residuals.mlp.mappings.res) if config.mhc_enabled else ()
