"""A hyper-connection as a stage: mappings, aggregate, the sub-layer, combine, and all their backwards."""

from typing import Any

import torch
from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.kernels import Kernels
from rlm_mhc.fn.mhc import Hidden, MHCMappings, activate, mhc_mappings
from rlm_mhc.fn.norm import widen
from rlm_mhc.fn.product import without_autocast
from rlm_mhc.fn.projections import project
from rlm_mhc.kernels.sinkhorn import sinkhorn_stage
from rlm_mhc.params import MHCParams
from rlm_mhc.stage import Grads, Stage, Weights, bring_stage, pullback, stage, stage_of
from rlm_mhc.stage.block import HyperResiduals
from rlm_mhc.variants import PRESETS


def hyper(site: str, branch: Stage, config: ModelConfig, kernels: Kernels) -> Stage:
    """`combine(x, branch(aggregate(x, pre)), post, res)` with the mappings of `x`, as `fn.hyper_connection`.

    The aggregate is computed again rather than kept: it reads what the backward reads anyhow.
    """
    mappings = mappings_stage(site, config, kernels)
    aggregate, combine = kernels.mhc_aggregate, kernels.mhc_combine
    early = PRESETS[config.mhc_preset].early_pre

    def forward(weights: Weights, hidden: Hidden) -> tuple[Hidden, HyperResiduals]:
        streams, given = hidden
        m, of_mappings = mappings.forward(weights, streams)
        output, of_branch = branch.forward(weights, aggregate(streams, given if early else m.pre))
        kept = HyperResiduals(m, output, of_mappings, of_branch)
        return replay(hidden, kept), kept

    def backward(weights: Weights, hidden: Hidden, kept: HyperResiduals, cotangent: Hidden) -> tuple[Grads, Hidden]:
        streams, given = hidden
        g_streams, g_next = cotangent
        m = kept.mappings
        _, pull_combine = pullback(combine, streams, kept.output, m.post, m.res)
        g_combine, g_output, g_post, g_res = pull_combine(g_streams)
        u, pull_aggregate = pullback(aggregate, streams, given if early else m.pre)
        grads, g_u = branch.backward(weights, u, kept.of_branch, g_output)
        g_aggregate, g_pre = pull_aggregate(g_u)
        g_own: Any = g_next if early else g_pre
        g_m = MHCMappings(g_own, g_post, g_res)
        own, g_mappings = mappings.backward(weights, streams, kept.of_mappings, g_m)
        g_x = g_combine + g_aggregate + g_mappings
        return grads | own, Hidden(g_x, g_pre if early else ())

    def replay(hidden: Hidden, kept: HyperResiduals) -> Hidden:
        m = kept.mappings
        return Hidden(combine(hidden.x, kept.output, m.post, m.res), m.pre if early else ())

    return Stage(forward, backward, replay)


def mappings_stage(site: str, config: ModelConfig, kernels: Kernels) -> Stage:
    """`x -> MHCMappings`: the stage that the kernel brings, or one derived from it."""
    names = tuple(f"{site}.{field}" for field in MHCParams._fields)
    run = kernels.mhc_mappings
    if build := stage_of(run, config.mhc_options):
        return build(names, config)

    def mapped(phi: Tensor, alpha: Tensor, bias: Tensor, x: Tensor) -> MHCMappings:
        return MHCMappings(*run(MHCParams(phi, alpha, bias), x, **config.mhc_options))

    return stage(mapped, *names)


def _mappings_stage(names: tuple[str, ...], config: ModelConfig) -> Stage:
    """The stage that `fn.mhc_mappings` brings; it keeps the product with `phi` and the norm."""
    n, preset, eps = config.mhc_flows, config.mhc_preset, config.norm_eps
    projection = projection_stage(config)

    def activated(h: Tensor, alpha: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return activate(h, alpha, bias, n, preset)

    def forward(weights: Weights, x: Tensor) -> tuple[MHCMappings, tuple[Tensor, Tensor]]:
        phi, alpha, bias = (weights[name] for name in names)
        flat = widen(x.flatten(-2))
        scale = torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)
        with without_autocast(x.device.type):
            h = scale * (flat @ phi.to(flat.dtype))
        pre, post, raw = activated(h, alpha, bias)
        return MHCMappings(pre, post, projection.forward({}, raw)[0]), (h, scale)

    def backward(
        weights: Weights, x: Tensor, kept: tuple[Tensor, Tensor], cotangent: MHCMappings
    ) -> tuple[Grads, Tensor]:
        phi, alpha, bias = (weights[name] for name in names)
        h, scale = kept
        (_, _, raw), pull = pullback(activated, h, alpha, bias)
        _, g_raw = projection.backward({}, raw, (), widen(cotangent.res))
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


bring_stage(mhc_mappings, _mappings_stage)


def projection_stage(config: ModelConfig) -> Stage:
    """`raw [*b, k] -> res [*b, n, n]`; it keeps nothing."""
    n, iters, eps = config.mhc_flows, config.mhc_sinkhorn_iters, PRESETS[config.mhc_preset].eps
    if config.projection != "sinkhorn":
        return stage(lambda raw: project(raw, n, config.projection))
    square = sinkhorn_stage(iters, eps)

    def backward(weights: Weights, raw: Tensor, residuals: Any, cotangent: Tensor) -> tuple[Grads, Tensor]:
        grads, g = square.backward(weights, raw.unflatten(-1, (n, n)), residuals, cotangent)
        return grads, g.flatten(-2)

    return Stage(lambda weights, raw: square.forward(weights, raw.unflatten(-1, (n, n))), backward)
