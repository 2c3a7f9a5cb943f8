"""From the streams to a sub-layer's mappings and its normed input, and the backward, as raw library ops.

README.md beside this file derives the backward and counts the bytes. None of them has a derivative of its own;
`rlm_mhc/kernels/stages.py` joins them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlm_mhc.fn.layout import aligned, flat, require_shape
from rlm_mhc.kernels.launch import MOST_ITERATIONS, require_streams, require_triton

FP32 = torch.float32
_library = torch.library.Library("rlm_mhc", "FRAGMENT")
_library.define(
    "mix_pre(Tensor streams, Tensor phi, Tensor alpha, Tensor bias, Tensor weight, int num_iters, float eps, "
    "float sinkhorn_eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "mix_pre_backward(Tensor streams, Tensor phi, Tensor alpha, Tensor bias, Tensor weight, Tensor pre, Tensor h, "
    "Tensor scale, Tensor rstd, Tensor g_normed, Tensor? g_pre, Tensor g_post, Tensor g_res, Tensor? more, "
    "Tensor? res, int num_iters, float sinkhorn_eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class Weights(NamedTuple):
    """Of one sub-layer: `phi [n·c, 2n+n²]`, `alpha [3]`, `bias [2n+n²]` in fp32; the norm's `weight [c]` as the
    streams or in fp32."""

    phi: Tensor
    alpha: Tensor
    bias: Tensor
    weight: Tensor


class Settings(NamedTuple):
    """Sinkhorn iterations, what is added to mean squares, and what Sinkhorn adds to its sums and `pre`."""

    num_iters: int
    eps: float
    sinkhorn_eps: float


class Mapped(NamedTuple):
    """`normed [*b, c]`, `pre [*b, n]`, `post [*b, n]`, `res [*b, n, n]`, and for the backward `h [*b, 2n+n²]`,
    `scale [*b]` and `rstd [*b]`."""

    normed: Tensor
    pre: Tensor
    post: Tensor
    res: Tensor
    h: Tensor
    scale: Tensor
    rstd: Tensor


def mix_pre(streams: Tensor, weights: Weights, settings: Settings) -> Mapped:
    """The mappings of `streams [*b, n, c]` and the RMS-normed aggregate by `pre`.

    Raises:
        ValueError: on another shape or dtype, iterations beyond 1 to 64, and where the Triton kernels do not run.
    """
    check(streams, weights, settings)
    return Mapped(*torch.ops.rlm_mhc.mix_pre(streams, *weights, *settings))


def mix_pre_backward(
    streams: Tensor,
    weights: Weights,
    kept: Mapped,
    cotangents: tuple[Tensor, Tensor | None, Tensor, Tensor],
    settings: Settings,
    more: Tensor | None = None,
    res: Tensor | None = None,
) -> tuple[Tensor, Weights]:
    """The cotangents of streams and weights, from those of normed, pre, post and res; errors as `mix_pre`.

    `more` is another cotangent of the streams, which is added; with `res` it is that of the streams which this `res`
    made of them, and `Σ_i res[i, j] · more[i]` is added.
    """
    check(streams, weights, settings)
    check_cotangents(streams, cotangents, more, res)
    tensors = (kept.pre, kept.h, kept.scale, kept.rstd, *cotangents, more, res)
    g_streams, *rest = torch.ops.rlm_mhc.mix_pre_backward(
        streams, *weights, *tensors, settings.num_iters, settings.sinkhorn_eps
    )
    return g_streams, Weights(*rest)


def check(streams: Tensor, weights: Weights, settings: Settings) -> None:
    """Refuse what the kernels would misread; see `mix_pre`."""
    require_streams(streams)
    n, c = streams.shape[-2:]
    raw = 2 * n + n * n
    for name, size in (("phi", (n * c, raw)), ("alpha", (3,)), ("bias", (raw,))):
        require_shape(name, getattr(weights, name), streams.device, size, FP32)
    require_shape("weight", weights.weight, streams.device, (c,), streams.dtype, FP32)
    if not 1 <= settings.num_iters <= MOST_ITERATIONS:
        raise ValueError(f"num_iters={settings.num_iters}: the Triton kernels take 1 to {MOST_ITERATIONS} iterations")
    if settings.eps < 0 or settings.sinkhorn_eps < 0:
        raise ValueError(f"eps={settings.eps}, sinkhorn_eps={settings.sinkhorn_eps}: expected no negative number")


def check_cotangents(
    streams: Tensor,
    cotangents: tuple[Tensor, Tensor | None, Tensor, Tensor],
    more: Tensor | None,
    res: Tensor | None,
) -> None:
    """Refuse cotangents of another shape or dtype than what they are of."""
    *b, n, c = streams.shape
    shapes = ((*b, c), (*b, n), (*b, n), (*b, n, n))
    for name, x, shape in zip(("normed", "pre", "post", "res"), cotangents, shapes, strict=True):
        if x is not None:
            dtype = streams.dtype if name == "normed" else FP32
            require_shape(f"cotangent of {name}", x, streams.device, shape, dtype)
    if more is not None:
        require_shape("more", more, streams.device, tuple(streams.shape), streams.dtype)
    if res is not None:
        require_shape("res", res, streams.device, (*b, n, n), FP32)


def run_forward(forward: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor, ...], rest: Any) -> tuple[Any, ...]:
    """The kernels of a forward on tensors of any strides, the streams being the first: `(streams, *Mapped)`.

    `rest` are the weights and settings.
    """
    streams, b = tensors[0], tensors[0].shape[:-2]
    own = (flat(x, x.dim() - len(b)) for x in tensors)
    mixed, *outputs = forward(*own, *(aligned(w) for w in rest[:4]), *rest[4:])
    return mixed.view(streams.shape), *(x.view(*b, *x.shape[1:]) for x in outputs)


def run_backward(
    streams: Tensor,
    weights: Weights,
    kept: tuple[Tensor, Tensor, Tensor, Tensor],
    cotangents: tuple[Tensor, Tensor | None, Tensor, Tensor],
    more: Tensor | None,
    res: Tensor | None,
    num_iters: int,
    sinkhorn_eps: float,
    given: bool = False,
) -> tuple[Tensor, ...]:
    """The kernels of the backward: cotangents of streams, of the `pre` that was given where one was, and of weights."""
    require_triton(streams.device)
    from rlm_mhc.kernels.mix_pre.triton_apply import to_streams
    from rlm_mhc.kernels.mix_pre.triton_backward import through_mappings, through_norm

    pre, h, scale, rstd = (flat(x, axes) for x, axes in zip(kept, (1, 1, 0, 0), strict=True))
    parts: Any = zip(cotangents, (1, 1, 1, 2), strict=True)
    own: Any = [None if g is None else flat(g, axes) for g, axes in parts]
    g_normed, g_pre, g_post, g_res = own
    x = flat(streams, 2)
    phi, alpha, bias, weight = (aligned(w) for w in weights)
    if not len(x):
        g_given = (pre.new_zeros(streams.shape[:-1]),) if given else ()
        return streams.new_zeros(streams.shape), *g_given, *(w.new_zeros(w.shape) for w in weights)
    normed, g_aggregate, g_weight = through_norm(x, pre, weight, rstd, g_normed)
    of_pre = (g_pre, None) if given else (g_aggregate, g_pre)
    g_product, inner, g_alpha, g_bias = through_mappings(
        h, scale, alpha, bias, (*of_pre, g_post, g_res), x.shape[-1], num_iters, sinkhorn_eps
    )  # fmt: skip
    g_streams, g_phi = to_streams(
        x, pre, phi, normed, g_product, inner,
        None if more is None else flat(more, 2), None if res is None else flat(res, 2),
    )  # fmt: skip
    g_given = (g_aggregate.view(streams.shape[:-1]),) if given else ()
    return g_streams.view(streams.shape), *g_given, g_phi, g_alpha, g_bias, g_weight


def fake_forward(streams: Tensor, raw: int) -> tuple[Tensor, ...]:
    """Empty tensors like `Mapped`."""
    *b, n, c = streams.shape
    shapes = ((n,), (n,), (n, n), (raw,), (), ())
    return streams.new_empty(*b, c), *(streams.new_empty((*b, *shape), dtype=FP32) for shape in shapes)


def _mix_pre(streams: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    require_triton(streams.device)
    from rlm_mhc.kernels.mix_pre.triton import forward

    return run_forward(forward, (streams,), rest)[1:]


def _mix_pre_backward(streams: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    weights, kept, cotangents, last = Weights(*rest[:4]), rest[4:8], rest[8:12], rest[12:]
    return run_backward(streams, weights, kept, cotangents, *last)


def _fake_backward(streams: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return streams.new_empty(streams.shape), *(w.new_empty(w.shape) for w in rest[:4])


_library.impl("mix_pre", _mix_pre, "CompositeExplicitAutograd")
_library.impl("mix_pre_backward", _mix_pre_backward, "CompositeExplicitAutograd")
torch.library.register_fake("rlm_mhc::mix_pre", lambda streams, phi, *rest: fake_forward(streams, phi.shape[-1]))
torch.library.register_fake("rlm_mhc::mix_pre_backward", _fake_backward)
