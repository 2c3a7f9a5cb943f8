"""A block mixed by Triton kernels, as a function and as a stage: between its sub-layers one kernel combines and maps.

    pre | attention | post and pre | MLP | post

Across blocks the mixing is not fused: a block ends in its combined streams, which `remat` stores and monitors read.
The backward of a sub-layer needs its combine's cotangent of the streams only together with that of its mappings, so
that `pre_backward` gets `more` and `res` and makes both in one pass.
"""

from functools import partial
from typing import Any

from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.attention import Attend, self_attention
from rlm_mhc.fn.block import BlockOutput, block
from rlm_mhc.fn.context import Context
from rlm_mhc.fn.kernels import REFERENCE, Kernels
from rlm_mhc.fn.mhc import Hidden, MHCMappings
from rlm_mhc.fn.mlp import mlp
from rlm_mhc.kernels.launch import MOST_ITERATIONS, MOST_STREAMS, WIDTH_MULTIPLE
from rlm_mhc.kernels.mix_post import mix_post, mix_post_reduce
from rlm_mhc.kernels.mix_pre import Mapped, Settings, Weights
from rlm_mhc.kernels.mix_pre.tiling import MOST_AT_ONCE, largest_partial_sums
from rlm_mhc.kernels.stages import combine, function, post_pre, post_pre_stage, pre, pre_backward, pre_stage
from rlm_mhc.params import Layer
from rlm_mhc.stage import Grads, Stage, Staged
from rlm_mhc.stage import Weights as Named
from rlm_mhc.stage.block import BlockBuilder, BlockResiduals, HyperResiduals, Site
from rlm_mhc.variants import PRESETS


def refusal(config: ModelConfig) -> str | None:
    """Why the fused mixing does not serve a model, or None.

    >>> refusal(ModelConfig.preset("1b")), refusal(ModelConfig(mhc_preset="hc"))
    (None, "mhc_preset='hc' makes res by unconstrained, not by sinkhorn")
    """
    if config.projection != "sinkhorn":
        return f"mhc_preset={config.mhc_preset!r} makes res by {config.projection}, not by sinkhorn"
    if config.mhc_flows > MOST_STREAMS:
        return f"mhc_flows={config.mhc_flows} is more than {MOST_STREAMS}"
    if config.hidden_dim % WIDTH_MULTIPLE:
        return f"hidden_dim={config.hidden_dim} is no multiple of {WIDTH_MULTIPLE}"
    if config.mhc_sinkhorn_iters > MOST_ITERATIONS:
        return f"mhc_sinkhorn_iters={config.mhc_sinkhorn_iters} is more than {MOST_ITERATIONS}"
    return None


def settings_of(config: ModelConfig) -> Settings:
    """Return what the kernels take of a config.

    Raises:
        ValueError: where they do not serve it.
    """
    if reason := refusal(config):
        raise ValueError(f"the Triton kernels do not serve this model: {reason}; use kernels=reference")
    return Settings(config.mhc_sinkhorn_iters, config.norm_eps, PRESETS[config.mhc_preset].eps)


def fused_block(
    params: Layer,
    hidden: Hidden,
    context: Context,
    config: ModelConfig,
    kernels: Kernels,
    cache: Any,
    attend: Attend,
) -> BlockOutput:
    """`fn.block`: the combine of the attention and the mappings of the MLP are one operation.

    Where a function stands in for a weight that the kernels read, the reference runs.
    """
    read = (params.attn_mhc, params.input_layernorm, params.mlp_mhc, params.post_attention_layernorm)
    if any(map(callable, read)):
        return block(params, hidden, context, config, kernels._replace(block=None), cache, attend)
    settings, early = settings_of(config), PRESETS[config.mhc_preset].early_pre
    normalise = partial(kernels.rms_norm, eps=config.norm_eps)
    streams, given = hidden.x, [hidden.pre] if early else []
    weights = (*params.attn_mhc, params.input_layernorm.weight)
    normed, pre, post, res = function(pre_stage(settings, early), "mix_pre", 4)(weights, streams, *given)
    output, cache = self_attention(params.self_attn, normed, context, cache, attend, normalise)
    given = [pre] if early else []
    weights = (*params.mlp_mhc, params.post_attention_layernorm.weight)
    run = function(post_pre_stage(settings, early), "mix_post_pre", 5)
    streams, normed, pre, mlp_post, mlp_res = run(weights, streams, output, post, res, *given)
    streams = combine(streams, mlp(params.mlp, normed, kernels.swiglu), mlp_post, mlp_res)
    return BlockOutput(Hidden(streams, pre if early else ()), (res, mlp_res), cache)


def block_stage(first: Site, second: Site, config: ModelConfig, keep_streams: bool) -> Stage:
    """The stage of two sub-layers, which keeps what `chain` of two `hyper` keeps, and the normed inputs."""
    settings = settings_of(config)
    early = PRESETS[config.mhc_preset].early_pre

    def site_forward(
        site: Site, weights: Named, streams: Tensor, given: Any, combined: Any = None
    ) -> tuple[Tensor, HyperResiduals]:
        own = Weights(*[weights[name] for name in site.weights])
        if combined is None:
            mapped = pre(streams, given, own, settings)
        else:
            streams, mapped = post_pre(streams, combined, given, own, settings)
        output, inner = site.branch.forward(weights, mapped.normed)
        mappings, rest = MHCMappings(mapped.pre, mapped.post, mapped.res), (mapped.h, mapped.scale, mapped.rstd)
        return streams, HyperResiduals(mappings, output, rest, (mapped.normed, inner))

    def forward(weights: Named, hidden: Hidden) -> tuple[Hidden, Any]:
        streams, given = hidden.x, hidden.pre if early else None
        streams, a = site_forward(first, weights, streams, given)
        combined = (a.output, a.mappings.post, a.mappings.res)
        between, b = site_forward(second, weights, streams, a.mappings.pre if early else None, combined)
        return combined_by(between, b), BlockResiduals(a, b, between if keep_streams else ())

    def site_backward(
        site: Site, weights: Named, streams: Tensor, given: Any, kept: HyperResiduals, cotangent: Hidden
    ) -> tuple[Grads, Hidden]:
        g_streams = cotangent.x
        g_next: Any = cotangent.pre if early else None
        normed, inner = kept.of_branch
        _, post, res = kept.mappings
        g_output, g_post, g_res = mix_post_reduce(streams, kept.output, post, g_streams)
        grads, g_normed = site.branch.backward(weights, normed, inner, g_output)
        own = Weights(*[weights[name] for name in site.weights])
        mapped = Mapped(normed, *kept.mappings, *kept.of_mappings)
        cotangents = (g_normed, g_next, g_post, g_res)
        g_x, g_given, g_own = pre_backward(streams, given, own, mapped, cotangents, settings, g_streams, res)
        grads |= dict(zip(site.weights, g_own, strict=True))
        return grads, Hidden(g_x, () if g_given is None else g_given)

    def backward(weights: Named, hidden: Hidden, kept: BlockResiduals, cotangent: Hidden) -> tuple[Grads, Hidden]:
        streams, given = hidden.x, hidden.pre if early else None
        a, b, between = kept
        if not keep_streams:
            between = mix_post(streams, a.output, a.mappings.post, a.mappings.res)
        of_second, cotangent = site_backward(second, weights, between, a.mappings.pre if early else None, b, cotangent)
        of_first, cotangent = site_backward(first, weights, streams, given, a, cotangent)
        return of_first | of_second, cotangent

    def combined_by(streams: Tensor, kept: HyperResiduals) -> Hidden:
        pre, post, res = kept.mappings
        mixed = mix_post(streams, kept.output, post, res)
        return Hidden(mixed, pre if early else ())

    def replay(hidden: Hidden, kept: BlockResiduals) -> Hidden:
        for part in (kept.attention, kept.mlp):
            hidden = combined_by(hidden.x, part)
        return hidden

    return Stage(forward, backward, replay)


def scratch(config: ModelConfig, state: int) -> int:
    """The partial sums of `phi`'s gradient, in bytes, and with many streams a cotangent that is combined apart."""
    apart = state if config.mhc_flows > MOST_AT_ONCE else 0
    return 4 * largest_partial_sums(config.mhc_flows, config.hidden_dim) + apart


FUSED = Staged(fused_block, BlockBuilder(block_stage, scratch))
TRITON = REFERENCE._replace(block=FUSED)
"""`fn.forward(params, tokens, config, kernels=TRITON)`: the reference, mixed by Triton kernels."""
