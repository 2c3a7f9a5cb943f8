"""The mixing of a sub-layer by libraries that are not ours, each told the same problem in its own convention."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlm_mhc.kernels.mix_pre import Settings

Op = Callable[..., tuple[Tensor, ...]]


class Implementation(NamedTuple):
    """An op, and how its arguments become what it takes: that is neither timed nor charged to it."""

    run: Op
    arrange: Op = lambda *inputs: inputs


def rows_first(phi: Tensor, bias: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """`phi` and `bias` of the transposed matrix: others normalise rows first, so theirs is the transpose of ours."""

    def turned(x: Tensor) -> Tensor:
        return torch.cat([x[..., : 2 * n], x[..., 2 * n :].unflatten(-1, (n, n)).mT.flatten(-2)], -1)

    return turned(phi), turned(bias)


def liger(settings: Settings) -> Implementation:
    """Liger-Kernel's three functions, with PyTorch's RMS norm of what the sub-layer reads."""
    from liger_kernel.transformers import functional as theirs

    def arrange(streams: Tensor, output: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, weight: Tensor) -> Any:
        return streams[None], output[None], *rows_first(phi, bias, streams.shape[-2]), *alpha.unbind(), weight

    def run(streams: Tensor, output: Tensor, phi: Tensor, bias: Tensor, *rest: Tensor) -> Any:
        *alpha, weight = rest
        how = dict(tmax=settings.num_iters, rms_eps=settings.eps, sinkhorn_eps=settings.sinkhorn_eps)
        how |= dict(allow_fp32=streams.dtype == torch.float32)
        pre, post, res = theirs.liger_mhc_coeffs(streams, phi, bias, *alpha, **how)
        u = theirs.liger_mhc_pre(streams, pre)[0].to(streams.dtype)
        normed = F.rms_norm(u, u.shape[-1:], weight, settings.eps)
        return normed, theirs.liger_mhc_post_res(streams, output, post, res.mT)[0]

    return Implementation(run, arrange)


def transformer_engine(settings: Settings) -> Implementation:
    """TransformerEngine's five functions (4 streams, which are its innermost axis), with PyTorch's RMS norm.

    The buffer is how it adds up the gradient of the streams without autograd.
    """
    from transformer_engine.pytorch.triton import mhc as theirs

    def arrange(streams: Tensor, output: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, weight: Tensor) -> Any:
        _, n, c = streams.shape
        phi, bias = rows_first(phi, bias, n)
        phi = phi.view(n, c, -1).permute(2, 1, 0).flatten(1)
        return streams.mT.contiguous()[None], output[None], phi, alpha, bias[None], weight

    def run(x: Tensor, output: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, weight: Tensor) -> Any:
        _, tokens, c, n = x.shape
        buffer = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        how = dict(use_tf32=x.dtype != torch.float32, fused_grad_x_acc_buffer=buffer)
        raw, mean_square = theirs.mhc_fused_projection(x.view(tokens, c * n), phi, **how)
        pre, post, res = theirs.mhc_fused_scale(raw, alpha, bias, mean_square, n)
        res = theirs.mhc_fused_sinkhorn(res.view(1, tokens, n, n), n, iters=settings.num_iters)
        u = theirs.mhc_fused_aggregate(x, pre.view(1, tokens, n), n, **how)[0]
        normed = F.rms_norm(u, u.shape[-1:], weight, settings.eps)
        mixed = theirs.mhc_fused_expand_combine(output, None, post.view(1, tokens, n), x, res, n, **how)
        return normed, mixed[0].mT

    return Implementation(run, arrange)


def tile_kernels(settings: Settings) -> Implementation:
    """TileKernels' two functions (4 streams in bf16), with PyTorch's RMS norm of what the sub-layer reads."""
    from tile_kernels.modeling.mhc.functional import mhc_pre
    from tile_kernels.modeling.mhc.ops.post import mhc_post

    def arrange(streams: Tensor, output: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, weight: Tensor) -> Any:
        phi, bias = rows_first(phi, bias, streams.shape[-2])
        return streams[None], output[None], phi.mT.contiguous(), alpha, bias, weight

    def run(streams: Tensor, output: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, weight: Tensor) -> Any:
        how = dict(norm_eps=settings.eps, pre_eps=0.0, sinkhorn_eps=settings.sinkhorn_eps)
        how |= dict(mhc_mult=streams.shape[-2], post_mult_value=2.0, sinkhorn_repeat=settings.num_iters)
        u, (post, res) = mhc_pre(streams, phi, alpha, bias, **how)
        normed = F.rms_norm(u[0], u.shape[-1:], weight, settings.eps)
        return normed, mhc_post(output, streams, post, res)[0]

    return Implementation(run, arrange)


PEERS: dict[str, Callable[[Settings], Implementation]] = {
    "Liger-Kernel": liger,
    "TransformerEngine": transformer_engine,
    "TileKernels": tile_kernels,
}
