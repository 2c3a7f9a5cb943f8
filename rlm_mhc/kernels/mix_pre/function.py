"""The ops of `mix_pre` as one differentiable function."""

from typing import Any

from torch import Tensor

from rlm_mhc.kernels.joined import Halves, joined
from rlm_mhc.kernels.mix_pre.op import Mapped, Settings, Weights, mix_pre_backward
from rlm_mhc.kernels.mix_pre.op import mix_pre as _mix_pre


def _forward(settings: Any, streams: Tensor, *weights: Tensor) -> Any:
    return tuple(_mix_pre(streams, Weights(*weights), settings))


def _backward(settings: Any, inputs: Any, outputs: Any, cotangents: Any) -> Any:
    streams, *weights = inputs
    g_streams, g_weights = mix_pre_backward(streams, Weights(*weights), Mapped(*outputs), cotangents, settings)
    return g_streams, *g_weights


HALVES = Halves("mix_pre", 5, 4, _forward, _backward)


def mix_pre(streams: Tensor, weights: Weights, settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(normed, pre, post, res)`: `fn.mhc_mappings`, and `fn.rms_norm` of `fn.mhc_aggregate`, by Triton kernels.

    Args:
        streams: `[*b, n, c]` in bf16, fp16 or fp32, n from 1 to 16, c a multiple of 16.
        weights: see `Weights`.
        settings: see `Settings`.

    Returns:
        `normed [*b, c]` as the streams; in fp32 `pre [*b, n]`, `post [*b, n]`, `res [*b, n, n]`.

    Raises:
        ValueError: on another shape or dtype, iterations beyond 1 to 64, and where the Triton kernels do not run.
    """
    return joined(HALVES, settings, (streams, *weights))
