"""The Triton ops as the `mixing` of `Kernels`, and what they serve."""

from typing import Any

from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.kernels import REFERENCE, Mixing
from rlm_mhc.kernels import single_pass
from rlm_mhc.kernels.launch import MOST_ITERATIONS, MOST_STREAMS, WIDTH_MULTIPLE
from rlm_mhc.kernels.mix_post import mix_post, mix_post_reduce
from rlm_mhc.kernels.mix_post_pre import mix_post_pre
from rlm_mhc.kernels.mix_post_pre.op import mix_post_pre as post_pre_op
from rlm_mhc.kernels.mix_pre import Mapped, Settings, Weights, mix_pre, mix_pre_backward
from rlm_mhc.kernels.mix_pre.op import mix_pre as pre_op
from rlm_mhc.kernels.mix_pre.tiling import MOST_AT_ONCE, largest_partial_sums
from rlm_mhc.kernels.single_pass import op as single_op
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


def _settings(config: ModelConfig) -> Settings:
    if reason := refusal(config):
        raise ValueError(f"the Triton kernels do not serve this model: {reason}; use training.kernels=reference")
    return Settings(config.mhc_sinkhorn_iters, config.norm_eps, PRESETS[config.mhc_preset].eps)


def _pre(streams: Tensor, weights: Any, settings: Settings, given: Tensor | None) -> Any:
    if given is None:
        return mix_pre(streams, Weights(*weights), settings)
    return single_pass.single_pass_pre(streams, given, Weights(*weights), settings)


def _post_pre(
    streams: Tensor, output: Tensor, post: Tensor, res: Tensor, weights: Any, settings: Settings, given: Tensor | None
) -> Any:
    if given is None:
        return mix_post_pre(streams, output, post, res, Weights(*weights), settings)
    return single_pass.single_pass_post_pre(streams, output, post, res, given, Weights(*weights), settings)


def _forward(streams: Tensor, weights: Any, settings: Settings, given: Tensor | None, combined: Any) -> Any:
    own = Weights(*weights)
    if combined is not None:
        output, post, res = combined
        if given is None:
            return post_pre_op(streams, output, post, res, own, settings)
        return single_op.single_pass_post_pre(streams, output, post, res, given, own, settings)
    if given is None:
        return streams, pre_op(streams, own, settings)
    return streams, single_op.single_pass_pre(streams, given, own, settings)


def _backward(
    streams: Tensor,
    weights: Any,
    settings: Settings,
    given: Tensor | None,
    mapped: Any,
    cotangents: Any,
    more: Tensor | None,
    res: Tensor | None,
) -> Any:
    own, kept = Weights(*weights), Mapped(*mapped)
    if given is None:
        g_streams, g_weights = mix_pre_backward(streams, own, kept, cotangents, settings, more, res)
        return g_streams, g_weights, None
    g_streams, g_given, g_weights = single_op.single_pass_pre_backward(
        streams, given, own, kept, cotangents, settings, more, res
    )
    return g_streams, g_weights, g_given


def _scratch(config: ModelConfig, state: int) -> int:
    """The partial sums of `phi`'s gradient, in bytes, and with many streams a cotangent that is combined apart."""
    apart = state if config.mhc_flows > MOST_AT_ONCE else 0
    return 4 * largest_partial_sums(config.mhc_flows, config.hidden_dim) + apart


MIXING = Mixing(_settings, _pre, _post_pre, mix_post, _forward, _backward, mix_post_reduce, _scratch)
TRITON = REFERENCE._replace(mixing=MIXING)
"""`fn.forward(params, tokens, config, kernels=TRITON)`: the reference, mixed by Triton kernels."""
