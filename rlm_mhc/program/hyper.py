"""A hyper-connection as a stage: mappings, aggregate, the sub-layer, combine, and all their backwards."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.kernels import Kernels
from rlm_mhc.fn.mhc import EarlyPre, activate, mhc_mappings
from rlm_mhc.fn.norm import widen
from rlm_mhc.fn.product import without_autocast
from rlm_mhc.fn.projections import project
from rlm_mhc.kernels.sinkhorn import sinkhorn, sinkhorn_backward
from rlm_mhc.params import MHCParams
from rlm_mhc.program.stage import Grads, Stage, Weights, pullback, stage
from rlm_mhc.variants import PRESETS


class Mappings(NamedTuple):
    """`pre, post [*b, n]`, `res [*b, n, n]`."""

    pre: Tensor
    post: Tensor
    res: Tensor


class HyperKept(NamedTuple):
    """Of one sub-layer: its mappings, its output, and what mappings and sub-layer keep for themselves."""

    mappings: Mappings
    output: Tensor
    of_mappings: Any
    of_branch: Any


def hyper(site: str, branch: Stage, config: ModelConfig, kernels: Kernels) -> Stage:
    """`combine(x, branch(aggregate(x, pre)), post, res)` with the mappings of `x`, as `fn.hyper_connection`.

    Where `pre` comes early, the input and the output are an `EarlyPre`. The aggregate is computed again rather than
    kept: it reads what the backward reads anyhow.
    """
    mappings = mappings_stage(site, config, kernels)
    aggregate, combine = kernels.mhc_aggregate, kernels.mhc_combine
    early = PRESETS[config.mhc_preset].early_pre

    def forward(weights: Weights, x: Any) -> tuple[Any, HyperKept]:
        streams, given = x if early else (x, None)
        m, of_mappings = mappings.forward(weights, streams)
        output, of_branch = branch.forward(weights, aggregate(streams, given if early else m.pre))
        kept = HyperKept(m, output, of_mappings, of_branch)
        return replay(x, kept), kept

    def backward(weights: Weights, x: Any, kept: HyperKept, cotangent: Any) -> tuple[Grads, Any]:
        streams, given = x if early else (x, None)
        g_streams, g_next = cotangent if early else (cotangent, cotangent)
        m = kept.mappings
        _, pull_combine = pullback(combine, streams, kept.output, m.post, m.res)
        g_combine, g_output, g_post, g_res = pull_combine(g_streams)
        u, pull_aggregate = pullback(aggregate, streams, given if early else m.pre)
        grads, g_u = branch.backward(weights, u, kept.of_branch, g_output)
        g_aggregate, g_pre = pull_aggregate(g_u)
        g_m = Mappings(g_next if early else g_pre, g_post, g_res)
        own, g_mappings = mappings.backward(weights, streams, kept.of_mappings, g_m)
        g_x = g_combine + g_aggregate + g_mappings
        return grads | own, EarlyPre(g_x, g_pre) if early else g_x

    def replay(x: Any, kept: HyperKept) -> Any:
        m = kept.mappings
        mixed = combine(x.streams if early else x, kept.output, m.post, m.res)
        return EarlyPre(mixed, m.pre) if early else mixed

    return Stage(forward, backward, replay)


def mappings_stage(site: str, config: ModelConfig, kernels: Kernels) -> Stage:
    """`x -> Mappings`: in two hand-written halves for `fn.mhc_mappings`, derived for any other function."""
    names = tuple(f"{site}.{field}" for field in MHCParams._fields)
    n, preset, eps = config.mhc_flows, config.mhc_preset, config.norm_eps
    if kernels.mhc_mappings is not mhc_mappings:
        run = kernels.mhc_mappings

        def mapped(phi: Tensor, alpha: Tensor, bias: Tensor, x: Tensor) -> Mappings:
            return Mappings(*run(MHCParams(phi, alpha, bias), x, **config.mhc_options))

        return stage(mapped, *names)

    to_res, pull_res = projection_halves(config)

    def activated(h: Tensor, alpha: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return activate(h, alpha, bias, n, preset)

    def forward(weights: Weights, x: Tensor) -> tuple[Mappings, tuple[Tensor, Tensor]]:
        phi, alpha, bias = (weights[name] for name in names)
        flat = widen(x.flatten(-2))
        scale = torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)
        with without_autocast(x.device.type):
            h = scale * (flat @ phi.to(flat.dtype))
        pre, post, raw = activated(h, alpha, bias)
        return Mappings(pre, post, to_res(raw)), (h, scale)

    def backward(weights: Weights, x: Tensor, kept: tuple[Tensor, Tensor], cotangent: Mappings) -> tuple[Grads, Tensor]:
        phi, alpha, bias = (weights[name] for name in names)
        h, scale = kept
        (_, _, raw), pull = pullback(activated, h, alpha, bias)
        g_raw = pull_res(raw, widen(cotangent.res))
        g_h, g_alpha, g_bias = pull((widen(cotangent.pre), widen(cotangent.post), g_raw))
        # h = scale · (flat @ phi), and the derivative of scale by flat is -scale³ · flat / size.
        flat = widen(x.flatten(-2))
        g_product = scale * g_h
        inner = (g_h * h).sum(-1, keepdim=True) * scale.square() / flat.shape[-1]
        with without_autocast(x.device.type):
            g_phi = flat.flatten(0, -2).mT @ g_product.flatten(0, -2)
            g_flat = g_product @ phi.to(flat.dtype).mT - inner * flat
        grads = dict(zip(names, (g_phi.to(phi.dtype), g_alpha, g_bias), strict=True))
        return grads, g_flat.to(x.dtype).unflatten(-1, x.shape[-2:])

    return Stage(forward, backward)


def projection_halves(
    config: ModelConfig,
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """`res` of its raw numbers, and their cotangent from them and that of `res`."""
    n, iters, eps = config.mhc_flows, config.mhc_sinkhorn_iters, PRESETS[config.mhc_preset].eps
    if config.projection == "sinkhorn":
        return (
            lambda raw: sinkhorn(raw.unflatten(-1, (n, n)), iters, eps),
            lambda raw, g: sinkhorn_backward(raw.unflatten(-1, (n, n)), g, iters, eps).flatten(-2),
        )

    def run(raw: Tensor) -> Tensor:
        return project(raw, n, config.projection)

    return run, lambda raw, g: pullback(run, raw)[1](g)[0]
