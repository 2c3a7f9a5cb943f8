"""The fused mixing as stages, and as differentiable functions made of them.

`given` is what aggregates in the place of `pre` where that comes early, from the sub-layer before; else it is absent.
The inputs `x` of a stage are a tuple; its weights are named as the fields of `Weights`.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rlm_mhc.kernels.mix_post import mix_post, mix_post_backward, mix_post_reduce
from rlm_mhc.kernels.mix_post_pre import mix_post_pre
from rlm_mhc.kernels.mix_pre import Mapped, Settings, Weights, mix_pre, mix_pre_backward
from rlm_mhc.kernels.single_pass import single_pass_post_pre, single_pass_pre, single_pass_pre_backward
from rlm_mhc.stage import Grads, Stage, as_function
from rlm_mhc.stage import Weights as Named

Cotangents = tuple[Tensor, Tensor | None, Tensor, Tensor]
Pulled = tuple[Grads, Any]  # named: the compiler does not trace a subscript in a signature


def pre(streams: Tensor, given: Tensor | None, weights: Weights, settings: Settings) -> Mapped:
    """Return the mappings of the streams, and their normed aggregate."""
    if given is None:
        return mix_pre(streams, weights, settings)
    return single_pass_pre(streams, given, weights, settings)


def post_pre(
    streams: Tensor, combined: tuple[Tensor, Tensor, Tensor], given: Tensor | None, weights: Weights, settings: Settings
) -> tuple[Tensor, Mapped]:
    """Return the combined streams, their mappings, and their normed aggregate; `combined` is `(output, post, res)`."""
    if given is None:
        return mix_post_pre(streams, *combined, weights, settings)
    return single_pass_post_pre(streams, *combined, given, weights, settings)


def pre_backward(
    streams: Tensor,
    given: Tensor | None,
    weights: Weights,
    mapped: Mapped,
    cotangents: Cotangents,
    settings: Settings,
    more: Tensor | None = None,
    res: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Weights]:
    """Return the cotangents of `streams`, `given` and `weights` from those of `normed, pre, post, res`.

    `more` is another cotangent of the streams, which is added; with `res`, `resᵀ · more` is.
    """
    if given is not None:
        every: Any = cotangents
        return single_pass_pre_backward(streams, given, weights, mapped, every, settings, more, res)
    g_streams, g_weights = mix_pre_backward(streams, weights, mapped, cotangents, settings, more, res)
    return g_streams, None, g_weights


def pre_stage(settings: Settings, early: bool = False) -> Stage:
    """`(streams[, given]) -> (normed, pre, post, res)`."""

    def forward(named: Named, x: Any) -> Any:
        streams, given = _given(x, early)
        mapped = pre(streams, given, _weights(named), settings)
        return tuple(mapped[:4]), tuple(mapped)

    def backward(named: Named, x: Any, residuals: Any, cotangents: Any) -> Pulled:
        streams, given = _given(x, early)
        g_streams, g_given, g_weights = pre_backward(
            streams, given, _weights(named), Mapped(*residuals), cotangents, settings
        )
        return _named(g_weights), (g_streams, g_given) if early else (g_streams,)

    return Stage(forward, backward)


def post_stage() -> Stage:
    """`(streams, output, post, res) -> streams`."""

    def backward(named: Named, x: Any, residuals: Any, cotangent: Tensor) -> Pulled:
        streams, output, post, res = x
        return {}, mix_post_backward(streams, output, post, res, cotangent)

    return Stage(lambda named, x: (mix_post(*x), ()), backward)


def post_pre_stage(settings: Settings, early: bool = False) -> Stage:
    """`(streams, output, post, res[, given]) -> (mixed, normed, pre, post, res)`."""

    def forward(named: Named, x: Any) -> Any:
        streams, output, post, res, given = _given(x, early)
        mixed, mapped = post_pre(streams, (output, post, res), given, _weights(named), settings)
        return (mixed, *mapped[:4]), (mixed, *mapped)

    def backward(named: Named, x: Any, residuals: Any, cotangents: Any) -> Pulled:
        streams, output, post, res, given = _given(x, early)
        mixed, *mapped = residuals
        g_mixed, *g_mapped = cotangents
        g_mixed, g_given, g_weights = pre_backward(
            mixed, given, _weights(named), Mapped(*mapped), tuple(g_mapped), settings, more=g_mixed
        )
        return _named(g_weights), (
            *mix_post_backward(streams, output, post, res, g_mixed),
            *((g_given,) if early else ()),
        )

    return Stage(forward, backward)


def sub_layer_stage(settings: Settings, early: bool = False) -> Stage:
    """`(streams, output[, given]) -> (normed, mixed[, pre])`: a sub-layer whose output is an input.

    Its backward is the program's: the cotangent of the streams goes through the combine and the mappings at once.
    """

    def forward(named: Named, x: Any) -> Any:
        streams, output, given = _given(x, early)
        normed, pre_, post, res, *rest = pre(streams, given, _weights(named), settings)
        outputs = (normed, mix_post(streams, output, post, res), pre_)
        return outputs if early else outputs[:2], (*outputs, post, res, *rest)

    def backward(named: Named, x: Any, residuals: Any, cotangents: Any) -> Pulled:
        streams, output, given = _given(x, early)
        normed, _, pre_, post, res, *rest = residuals
        g_normed, g_mixed, *g_pre = cotangents
        g_output, g_post, g_res = mix_post_reduce(streams, output, post, g_mixed)
        g_mapped = (g_normed, g_pre[0] if early else None, g_post, g_res)
        mapped = Mapped(normed, pre_, post, res, *rest)
        g_streams, g_given, g_weights = pre_backward(
            streams, given, _weights(named), mapped, g_mapped, settings, more=g_mixed, res=res
        )
        return _named(g_weights), (g_streams, g_output, *((g_given,) if early else ()))

    return Stage(forward, backward)


def function(stage: Stage, name: str, outputs: int) -> Callable[..., Any]:
    """Return `f(weights, *x)`, the differentiable function of a stage above whose residuals begin with its outputs."""
    run = as_function(stage, name, outputs=outputs, reads_outputs=True)
    return lambda weights, *x: run(_named(weights), x)


def combine(streams: Tensor, output: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """`fn.mhc_combine` by a Triton kernel: `streams'[i] = Σ_j res[i, j] · streams[j] + post[i] · output`.

    Args:
        streams: `[*b, n, c]` in bf16, fp16 or fp32, n from 1 to 16, c a multiple of 16.
        output: `[*b, c]`, of the same dtype.
        post: `[*b, n]` in fp32.
        res: `[*b, n, n]` in fp32.

    Raises:
        ValueError: on another shape or dtype, and where the Triton kernels do not run.
    """
    return as_function(post_stage(), "mix_post")({}, (streams, output, post, res))


def _given(x: Any, early: bool) -> Any:
    return x if early else (*x, None)


def _weights(named: Named) -> Weights:
    return Weights(*[named[name] for name in Weights._fields])


def _named(weights: Any) -> Grads:
    return dict(zip(Weights._fields, weights, strict=True))
