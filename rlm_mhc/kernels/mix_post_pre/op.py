"""The combine of one sub-layer and the `mix_pre` of the next in one pass over the streams, as a raw library op.

README.md beside this file counts the bytes. Its backward is that of `mix_pre`, whose cotangent of the streams then goes
through that of `mix_post`.
"""

from typing import Any

import torch
from torch import Tensor

from rlm_mhc.fn.layout import require_shape
from rlm_mhc.kernels.launch import require_triton
from rlm_mhc.kernels.mix_pre.op import (
    FP32,
    Mapped,
    Settings,
    Weights,
    check,
    fake_forward,
    run_forward,
)

_library = torch.library.Library("rlm_mhc", "FRAGMENT")
_library.define(
    "mix_post_pre(Tensor streams, Tensor output, Tensor post, Tensor res, Tensor phi, Tensor alpha, Tensor bias, "
    "Tensor weight, int num_iters, float eps, float sinkhorn_eps) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def mix_post_pre(
    streams: Tensor, output: Tensor, post: Tensor, res: Tensor, weights: Weights, settings: Settings
) -> tuple[Tensor, Mapped]:
    """`mixed = mix_post(streams, output, post, res)`, and `mix_pre(mixed, weights, settings)`; errors as theirs."""
    check_combined(streams, output, post, res, weights, settings)
    mixed, *mapped = torch.ops.rlm_mhc.mix_post_pre(streams, output, post, res, *weights, *settings)
    return mixed, Mapped(*mapped)


def check_combined(
    streams: Tensor, output: Tensor, post: Tensor, res: Tensor, weights: Weights, settings: Settings
) -> None:
    """Refuse what the kernels would misread."""
    check(streams, weights, settings)
    *b, n, c = streams.shape
    require_shape("output", output, streams.device, (*b, c), streams.dtype)
    require_shape("post", post, streams.device, (*b, n), FP32)
    require_shape("res", res, streams.device, (*b, n, n), FP32)


def _mix_post_pre(streams: Tensor, output: Tensor, post: Tensor, res: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    require_triton(streams.device)
    from rlm_mhc.kernels.mix_post_pre.triton import forward

    return run_forward(forward, (streams, output, post, res), rest)


def _fake(streams: Tensor, output: Tensor, post: Tensor, res: Tensor, phi: Tensor, *rest: Any) -> tuple:
    return streams.new_empty(streams.shape), *fake_forward(streams, phi.shape[-1])


_library.impl("mix_post_pre", _mix_post_pre, "CompositeExplicitAutograd")
torch.library.register_fake("rlm_mhc::mix_post_pre", _fake)
