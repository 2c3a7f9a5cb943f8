"""The op of `mix_post_pre` and its backward as one differentiable function."""

from typing import Any

from torch import Tensor

from rlm_mhc.kernels.joined import Halves, joined
from rlm_mhc.kernels.mix_post_pre.op import mix_post_pre as _mix_post_pre
from rlm_mhc.kernels.mix_post_pre.op import mix_post_pre_backward
from rlm_mhc.kernels.mix_pre.op import Mapped, Settings, Weights


def _forward(settings: Any, *inputs: Any) -> Any:
    streams, output, post, res, *weights = inputs
    mixed, mapped = _mix_post_pre(streams, output, post, res, Weights(*weights), settings)
    return mixed, *mapped


def _backward(settings: Any, inputs: Any, outputs: Any, cotangents: Any) -> Any:
    weights, kept = Weights(*inputs[4:]), Mapped(*outputs[1:])
    g_before, g_weights = mix_post_pre_backward(inputs[:4], weights, outputs[0], kept, cotangents, settings)
    return *g_before, *g_weights


HALVES = Halves("mix_post_pre", 8, 5, _forward, _backward)


def mix_post_pre(
    streams: Tensor, output: Tensor, post: Tensor, res: Tensor, weights: Weights, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(mixed, normed, pre, post, res)`: `mix_post(streams, output, post, res)`, then `mix_pre` of that.

    Arguments and errors are those of the two.
    """
    return joined(HALVES, settings, (streams, output, post, res, *weights))
