"""`mix_pre` and `mix_post_pre` where `pre` is known beforehand, so that one pass over the streams suffices.

Raw library ops; `rlm_mhc/kernels/stages.py` joins them with their backward. The mappings are computed all the same:
their `pre` is for the next sub-layer, and is another one than the `given` that aggregates here.
"""

from typing import Any

import torch
from torch import Tensor

from rlm_mhc.fn.layout import require_shape
from rlm_mhc.kernels.launch import require_triton
from rlm_mhc.kernels.mix_post_pre.op import check_combined
from rlm_mhc.kernels.mix_pre.op import (
    FP32,
    Mapped,
    Settings,
    Weights,
    check,
    check_cotangents,
    fake_forward,
    run_backward,
    run_forward,
)

_library = torch.library.Library("rlm_mhc", "FRAGMENT")
_library.define(
    "single_pass_pre(Tensor streams, Tensor given, Tensor phi, Tensor alpha, Tensor bias, Tensor weight, "
    "int num_iters, float eps, float sinkhorn_eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "single_pass_pre_backward(Tensor streams, Tensor given, Tensor phi, Tensor alpha, Tensor bias, Tensor weight, "
    "Tensor h, Tensor scale, Tensor rstd, Tensor g_normed, Tensor g_pre, Tensor g_post, Tensor g_res, Tensor? more, "
    "Tensor? res, int num_iters, float sinkhorn_eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "single_pass_post_pre(Tensor streams, Tensor output, Tensor post, Tensor res, Tensor given, Tensor phi, "
    "Tensor alpha, Tensor bias, Tensor weight, int num_iters, float eps, float sinkhorn_eps) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def single_pass_pre(streams: Tensor, given: Tensor, weights: Weights, settings: Settings) -> Mapped:
    """As `mix_pre`, the aggregate being by `given [*b, n]` in fp32; errors as there."""
    check(streams, weights, settings)
    require_shape("given", given, streams.device, tuple(streams.shape[:-1]), FP32)
    return Mapped(*torch.ops.rlm_mhc.single_pass_pre(streams, given, *weights, *settings))


def single_pass_pre_backward(
    streams: Tensor,
    given: Tensor,
    weights: Weights,
    kept: Mapped,
    cotangents: tuple[Tensor, Tensor, Tensor, Tensor],
    settings: Settings,
    more: Tensor | None = None,
    res: Tensor | None = None,
) -> tuple[Tensor, Tensor, Weights]:
    """The cotangents of streams, given and weights; the rest as in `mix_pre_backward`."""
    check(streams, weights, settings)
    check_cotangents(streams, cotangents, more, res)
    tensors = (kept.h, kept.scale, kept.rstd, *cotangents, more, res)
    g_streams, g_given, *rest = torch.ops.rlm_mhc.single_pass_pre_backward(
        streams, given, *weights, *tensors, settings.num_iters, settings.sinkhorn_eps
    )
    return g_streams, g_given, Weights(*rest)


def single_pass_post_pre(
    streams: Tensor, output: Tensor, post: Tensor, res: Tensor, given: Tensor, weights: Weights, settings: Settings
) -> tuple[Tensor, Mapped]:
    """`mixed = mix_post(streams, output, post, res)`, and `single_pass_pre(mixed, given, …)`: one read, one write."""
    check_combined(streams, output, post, res, weights, settings)
    require_shape("given", given, streams.device, tuple(streams.shape[:-1]), FP32)
    mixed, *mapped = torch.ops.rlm_mhc.single_pass_post_pre(streams, output, post, res, given, *weights, *settings)
    return mixed, Mapped(*mapped)


def _single_pass_pre(streams: Tensor, given: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    require_triton(streams.device)
    from rlm_mhc.kernels.single_pass.triton import pre

    return run_forward(pre, (streams, given), rest)[1:]


def _single_pass_pre_backward(streams: Tensor, given: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    kept, cotangents, (more, res, num_iters, sinkhorn_eps) = (given, *rest[4:7]), rest[7:11], rest[11:]
    weights: Any = Weights(*rest[:4])
    return run_backward(streams, weights, kept, cotangents, more, res, num_iters, sinkhorn_eps, True)


def _single_pass_post_pre(
    streams: Tensor, output: Tensor, post: Tensor, res: Tensor, given: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    require_triton(streams.device)
    from rlm_mhc.kernels.single_pass.triton import post_pre

    return run_forward(post_pre, (streams, output, post, res, given), rest)


def _fake_backward(streams: Tensor, given: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    weights = (w.new_empty(w.shape) for w in rest[:4])
    return streams.new_empty(streams.shape), given.new_empty(given.shape), *weights


def _fake_post_pre(streams: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return streams.new_empty(streams.shape), *fake_forward(streams, rest[4].shape[-1])


_library.impl("single_pass_pre", _single_pass_pre, "CompositeExplicitAutograd")
_library.impl("single_pass_pre_backward", _single_pass_pre_backward, "CompositeExplicitAutograd")
_library.impl("single_pass_post_pre", _single_pass_post_pre, "CompositeExplicitAutograd")
torch.library.register_fake(
    "rlm_mhc::single_pass_pre", lambda streams, given, phi, *rest: fake_forward(streams, phi.shape[-1])
)
torch.library.register_fake("rlm_mhc::single_pass_pre_backward", _fake_backward)
torch.library.register_fake("rlm_mhc::single_pass_post_pre", _fake_post_pre)
