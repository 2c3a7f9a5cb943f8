"""One transformer block as a stage, cut so that each stage ends in a matrix product.

    mappings, aggregate, norm, q/k/v products, rotation | attention | output product, combine
    mappings, aggregate, norm, gate/up products | SwiGLU, down product, combine

What is kept of a block is the input of each stage. The backward of a stage that ends in a product does not run that
product again, so with `remat="none"` no product with a weight and no attention is computed twice.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.attention import heads
from rlm_mhc.fn.kernels import Kernels
from rlm_mhc.fn.mlp import swiglu
from rlm_mhc.params import MLP, Linear, weight_table
from rlm_mhc.program.attention import attention_stage
from rlm_mhc.program.hyper import hyper
from rlm_mhc.program.mixing import Site, mixed_block
from rlm_mhc.program.stage import Stage, chain, residual, stage
from rlm_mhc.tree import named_leaves, rebuild

MLP_PARTS = ("gate", "up", "down")
ATTENTION_NORM, MLP_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"


def block_stage(config: ModelConfig, kernels: Kernels, *, keep_streams: bool = True) -> Stage:
    """`hidden -> hidden` of one layer, its weights under their names in `Layer`, with `cos` and `sin` beside them.

    It keeps the input of every inner stage, with `keep_streams=False` all but the streams between its two halves.
    With `kernels.mixing` see `mixed_block`.
    """
    if config.mhc_enabled and kernels.mixing is not None:
        attention, mlp = (part(config, kernels, normed=True) for part in (_attention, _mlp))
        first, second = Site("attn_mhc", ATTENTION_NORM, attention), Site("mlp_mhc", MLP_NORM, mlp)
        return mixed_block(first, second, config, kernels.mixing, keep_streams)
    sites = (("attn_mhc", _attention(config, kernels)), ("mlp_mhc", _mlp(config, kernels)))
    if config.mhc_enabled:
        parts = [hyper(site, branch, config, kernels) for site, branch in sites]
    else:
        parts = [residual(branch) for _, branch in sites]
    return chain(*parts, keep=keep_streams)


def _attention(config: ModelConfig, kernels: Kernels, *, normed: bool = False) -> Stage:
    """With `normed` of an input that is normed already."""
    norm = partial(kernels.rms_norm, eps=config.norm_eps)
    before = weight_table(config).layers[0].self_attn._replace(o_proj=())
    names = [f"self_attn.{name}" for name in named_leaves(before)]

    def project(*rest: Tensor) -> Any:
        *weights, cos, sin, x = rest
        return heads(rebuild(before, iter(weights)), x, cos, sin, norm)

    def norm_and_project(scale: Tensor, *rest: Tensor) -> Any:
        *weights, u = rest
        return project(*weights, norm(u, scale))

    def merge(o: Tensor, heads: Tensor) -> Tensor:
        return F.linear(rearrange(heads, "... h s d -> ... s (h d)"), o)

    start = (project,) if normed else (norm_and_project, ATTENTION_NORM)
    return chain(
        stage(*start, *names, constants=("cos", "sin")),
        attention_stage(kernels.attention),
        stage(merge, "self_attn.o_proj.weight"),
    )


def _mlp(config: ModelConfig, kernels: Kernels, *, normed: bool = False) -> Stage:
    """With `normed` of an input that is normed already."""
    eps = config.norm_eps
    gate, up, down = (f"mlp.{name}_proj.weight" for name in MLP_PARTS)
    if kernels.swiglu is not swiglu:
        run = kernels.swiglu

        def whole(gate: Tensor, up: Tensor, down: Tensor, x: Tensor) -> Tensor:
            return run(MLP(Linear(gate), Linear(up), Linear(down)), x)

        def norm_and_whole(norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, u: Tensor) -> Tensor:
            return whole(gate, up, down, kernels.rms_norm(u, norm, eps))

        return stage(whole, gate, up, down) if normed else stage(norm_and_whole, MLP_NORM, gate, up, down)

    def widen(gate: Tensor, up: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, gate), F.linear(x, up)

    def norm_and_widen(norm: Tensor, gate: Tensor, up: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return widen(gate, up, kernels.rms_norm(u, norm, eps))

    def narrow(down: Tensor, gate_and_up: tuple[Tensor, Tensor]) -> Tensor:
        gate, up = gate_and_up
        # silu written out: its derivative then reads the same sigmoid, where that of F.silu computes another.
        return F.linear(gate * torch.sigmoid(gate) * up, down)

    start = stage(widen, gate, up) if normed else stage(norm_and_widen, MLP_NORM, gate, up)
    return chain(start, stage(narrow, down))


def residual_mappings(kept: Any, config: ModelConfig) -> tuple[Tensor, ...]:
    """`res` of the block's two sites, from what its forward kept."""
    return tuple(part.mappings.res for part in kept[1]) if config.mhc_enabled else ()
