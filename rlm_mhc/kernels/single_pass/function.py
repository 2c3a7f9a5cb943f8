"""The ops of `single_pass` as differentiable functions."""

from typing import Any

from torch import Tensor

from rlm_mhc.kernels.joined import Halves, joined
from rlm_mhc.kernels.mix_post.op import mix_post_backward
from rlm_mhc.kernels.mix_pre.op import Mapped, Settings, Weights
from rlm_mhc.kernels.single_pass import op


def _pre_forward(settings: Any, streams: Tensor, given: Tensor, *weights: Tensor) -> Any:
    return tuple(op.single_pass_pre(streams, given, Weights(*weights), settings))


def _pre_backward(settings: Any, inputs: Any, outputs: Any, cotangents: Any) -> Any:
    streams, given, *weights = inputs
    g_streams, g_given, g_weights = op.single_pass_pre_backward(
        streams, given, Weights(*weights), Mapped(*outputs), cotangents, settings
    )
    return g_streams, g_given, *g_weights


def _post_pre_forward(settings: Any, *inputs: Any) -> Any:
    streams, output, post, res, given, *weights = inputs
    mixed, mapped = op.single_pass_post_pre(streams, output, post, res, given, Weights(*weights), settings)
    return mixed, *mapped


def _post_pre_backward(settings: Any, inputs: Any, outputs: Any, cotangents: Any) -> Any:
    streams, output, post, res, given, *weights = inputs
    g_mixed, g_given, g_weights = op.single_pass_pre_backward(
        outputs[0], given, Weights(*weights), Mapped(*outputs[1:]), cotangents[1:], settings, more=cotangents[0]
    )
    return *mix_post_backward(streams, output, post, res, g_mixed), g_given, *g_weights


PRE = Halves("single_pass_pre", 6, 4, _pre_forward, _pre_backward)
POST_PRE = Halves("single_pass_post_pre", 9, 5, _post_pre_forward, _post_pre_backward)


def single_pass_pre(
    streams: Tensor, given: Tensor, weights: Weights, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `mix_pre`, the aggregate being by `given [*b, n]` in fp32; the `pre` returned is for the next sub-layer."""
    return joined(PRE, settings, (streams, given, *weights))


def single_pass_post_pre(
    streams: Tensor, output: Tensor, post: Tensor, res: Tensor, given: Tensor, weights: Weights, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(mixed, normed, pre, post, res)`: `mix_post(streams, output, post, res)`, then `single_pass_pre` of that."""
    return joined(POST_PRE, settings, (streams, output, post, res, given, *weights))
