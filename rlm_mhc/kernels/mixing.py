"""The Triton ops as the `mixing` of `Kernels`, and what they serve."""

from typing import Any

from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.kernels import REFERENCE, Mixing
from rlm_mhc.kernels import stages
from rlm_mhc.kernels.launch import MOST_ITERATIONS, MOST_STREAMS, WIDTH_MULTIPLE
from rlm_mhc.kernels.mix_post import mix_post_reduce
from rlm_mhc.kernels.mix_pre import Mapped, Settings, Weights
from rlm_mhc.kernels.mix_pre.tiling import MOST_AT_ONCE, largest_partial_sums
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
    early = given is not None
    run = stages.function(stages.pre_stage(settings, early), "single_pass_pre" if early else "mix_pre", 4)
    return run(weights, streams, *((given,) if early else ()))


def _post_pre(
    streams: Tensor, output: Tensor, post: Tensor, res: Tensor, weights: Any, settings: Settings, given: Tensor | None
) -> Any:
    early = given is not None
    name = "single_pass_post_pre" if early else "mix_post_pre"
    run = stages.function(stages.post_pre_stage(settings, early), name, 5)
    return run(weights, streams, output, post, res, *((given,) if early else ()))


def _forward(streams: Tensor, weights: Any, settings: Settings, given: Tensor | None, combined: Any) -> Any:
    own = Weights(*weights)
    if combined is not None:
        return stages.post_pre(streams, combined, given, own, settings)
    return streams, stages.pre(streams, given, own, settings)


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
    own = Weights(*weights)
    g_streams, g_given, g_weights = stages.pre_backward(
        streams, given, own, Mapped(*mapped), cotangents, settings, more, res
    )
    return g_streams, g_weights, g_given


def _scratch(config: ModelConfig, state: int) -> int:
    """The partial sums of `phi`'s gradient, in bytes, and with many streams a cotangent that is combined apart."""
    apart = state if config.mhc_flows > MOST_AT_ONCE else 0
    return 4 * largest_partial_sums(config.mhc_flows, config.hidden_dim) + apart


MIXING = Mixing(_settings, _pre, _post_pre, stages.combine, _forward, _backward, mix_post_reduce, _scratch)
TRITON = REFERENCE._replace(mixing=MIXING)
"""`fn.forward(params, tokens, config, kernels=TRITON)`: the reference, mixed by Triton kernels."""
