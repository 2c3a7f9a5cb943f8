"""A hyper-connection as a stage: mappings, aggregate, the sub-layer, combine, and all their backwards."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.kernels import Kernels
from rlm_mhc.fn.mhc import activate, mhc_mappings
from rlm_mhc.fn.norm import widen
from rlm_mhc.kernels.sinkhorn import sinkhorn, sinkhorn_backward
from rlm_mhc.params import MHCParams
from rlm_mhc.program.stage import Grads, Stage, Weights, pullback, stage


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

    The aggregate is computed again rather than kept: it reads what the backward reads anyhow.
    """
    mappings = mappings_stage(site, config, kernels)
    aggregate, combine = kernels.mhc_aggregate, kernels.mhc_combine

    def forward(weights: Weights, x: Tensor) -> tuple[Tensor, HyperKept]:
        m, of_mappings = mappings.forward(weights, x)
        output, of_branch = branch.forward(weights, aggregate(x, m.pre))
        return combine(x, output, m.post, m.res), HyperKept(m, output, of_mappings, of_branch)

    def backward(weights: Weights, x: Tensor, kept: HyperKept, cotangent: Tensor) -> tuple[Grads, Tensor]:
        m = kept.mappings
        _, pull_combine = pullback(combine, x, kept.output, m.post, m.res)
        g_combine, g_output, g_post, g_res = pull_combine(cotangent)
        u, pull_aggregate = pullback(aggregate, x, m.pre)
        grads, g_u = branch.backward(weights, u, kept.of_branch, g_output)
        g_aggregate, g_pre = pull_aggregate(g_u)
        own, g_mappings = mappings.backward(weights, x, kept.of_mappings, Mappings(g_pre, g_post, g_res))
        return grads | own, g_combine + g_aggregate + g_mappings

    def replay(x: Tensor, kept: HyperKept) -> Tensor:
        return combine(x, kept.output, kept.mappings.post, kept.mappings.res)

    return Stage(forward, backward, replay)


def mappings_stage(site: str, config: ModelConfig, kernels: Kernels) -> Stage:
    """`x -> Mappings`: in two hand-written halves for `fn.mhc_mappings`, derived for any other function."""
    names = tuple(f"{site}.{field}" for field in MHCParams._fields)
    iters, eps = config.mhc_sinkhorn_iters, config.norm_eps
    if kernels.mhc_mappings is not mhc_mappings:
        run = kernels.mhc_mappings

        def mapped(phi: Tensor, alpha: Tensor, bias: Tensor, x: Tensor) -> Mappings:
            return Mappings(*run(MHCParams(phi, alpha, bias), x, num_iters=iters, eps=eps))

        return stage(mapped, *names)

    def forward(weights: Weights, x: Tensor) -> tuple[Mappings, tuple[Tensor, Tensor]]:
        phi, alpha, bias = (weights[name] for name in names)
        flat = widen(x.flatten(-2))
        scale = torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)
        raw = scale * (flat @ phi.to(flat.dtype))
        pre, post, logits = activate(raw, alpha, bias)
        return Mappings(pre, post, sinkhorn(logits, iters)), (raw, scale)

    def backward(weights: Weights, x: Tensor, kept: tuple[Tensor, Tensor], cotangent: Mappings) -> tuple[Grads, Tensor]:
        phi, alpha, bias = (weights[name] for name in names)
        raw, scale = kept
        (_, _, logits), pull = pullback(activate, raw, alpha, bias)
        g_logits = sinkhorn_backward(logits, widen(cotangent.res), iters)
        g_raw, g_alpha, g_bias = pull((widen(cotangent.pre), widen(cotangent.post), g_logits))
        # raw = scale · (flat @ phi), and the derivative of scale by flat is -scale³ · flat / size.
        flat = widen(x.flatten(-2))
        g_product = scale * g_raw
        g_phi = flat.flatten(0, -2).mT @ g_product.flatten(0, -2)
        inner = (g_raw * raw).sum(-1, keepdim=True) * scale.square() / flat.shape[-1]
        g_flat = g_product @ phi.to(flat.dtype).mT - inner * flat
        grads = dict(zip(names, (g_phi.to(phi.dtype), g_alpha, g_bias), strict=True))
        return grads, g_flat.to(x.dtype).unflatten(-1, x.shape[-2:])

    return Stage(forward, backward)
