"""The mixing of a sub-layer by libraries that are not ours, each told the same problem in its own convention."""

import inspect
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


class Peer(NamedTuple):
    """A library's two halves of a sub-layer's mixing, on what is laid out as it wants it.

    `streams(streams)` and `weights(n, phi, alpha, bias, weight)` lay out; `pre(x, *weights)` gives `(normed, pre, post,
    res)` as ours are, `pre` None where the library does not tell it; `post(x, output, post, res)` the mixed streams as
    ours are. Where `turned`, the library reads `res` transposed. `shared(x)` is what only both halves together may be
    given, as a further argument.
    """

    streams: Callable[[Tensor], Tensor]
    weights: Callable[..., tuple[Tensor, ...]]
    pre: Op
    post: Callable[..., Tensor]
    turned: bool
    shared: Callable[[Tensor], dict[str, Any]] = lambda x: {}


def rows_first(phi: Tensor, bias: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """`phi` and `bias` of the transposed matrix: others normalise rows first, so theirs is the transpose of ours."""

    def turned(x: Tensor) -> Tensor:
        return torch.cat([x[..., : 2 * n], x[..., 2 * n :].unflatten(-1, (n, n)).mT.flatten(-2)], -1)

    return turned(phi), turned(bias)


def liger(settings: Settings) -> Peer:
    """Liger-Kernel's three functions, with PyTorch's RMS norm of what the sub-layer reads."""
    from liger_kernel.transformers import functional as theirs

    def weights(n: int, phi: Tensor, alpha: Tensor, bias: Tensor, weight: Tensor) -> Any:
        return *rows_first(phi, bias, n), *alpha.unbind(), weight

    def pre(x: Tensor, phi: Tensor, bias: Tensor, *rest: Tensor) -> Any:
        *alpha, weight = rest
        how = dict(tmax=settings.num_iters, rms_eps=settings.eps, sinkhorn_eps=settings.sinkhorn_eps)
        how |= dict(allow_fp32=x.dtype == torch.float32)
        pre, post, res = theirs.liger_mhc_coeffs(x, phi, bias, *alpha, **how)
        u = theirs.liger_mhc_pre(x, pre)[0].to(x.dtype)
        return F.rms_norm(u, u.shape[-1:], weight, settings.eps), pre[0], post[0], res[0].mT

    def post(x: Tensor, output: Tensor, post: Tensor, res: Tensor) -> Tensor:
        return theirs.liger_mhc_post_res(x, output[None], post[None], res[None])[0]

    return Peer(lambda streams: streams[None], weights, pre, post, turned=False)


def transformer_engine(settings: Settings) -> Peer:
    """TransformerEngine's five functions (4 streams, which are its innermost axis), with PyTorch's RMS norm.

    Where its version takes a buffer in which both halves add up the gradient of the streams without autograd, they get
    one; the second half is the first to write to it.
    """
    from transformer_engine.pytorch.triton import mhc as theirs

    buffered = "fused_grad_x_acc_buffer" in inspect.signature(theirs.mhc_fused_projection).parameters

    def shared(x: Tensor) -> dict[str, Any]:
        if not buffered:
            return {}
        return {"fused_grad_x_acc_buffer": torch.empty(x.shape, dtype=torch.float32, device=x.device)}

    def streams(streams: Tensor) -> Tensor:
        return streams.mT.contiguous()[None]

    def weights(n: int, phi: Tensor, alpha: Tensor, bias: Tensor, weight: Tensor) -> Any:
        phi, bias = rows_first(phi, bias, n)
        return phi.unflatten(0, (n, -1)).permute(2, 1, 0).flatten(1), alpha, bias[None], weight

    def pre(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, weight: Tensor, **shared: Any) -> Any:
        _, tokens, c, n = x.shape
        options = dict(use_tf32=x.dtype != torch.float32, **shared)
        raw, mean_square = theirs.mhc_fused_projection(x.view(tokens, c * n), phi, **options)
        pre, post, res = theirs.mhc_fused_scale(raw, alpha, bias, mean_square, n)
        res = theirs.mhc_fused_sinkhorn(res.view(1, tokens, n, n), n, iters=settings.num_iters)
        u = theirs.mhc_fused_aggregate(x, pre.view(1, tokens, n), n, **options)[0]
        normed = F.rms_norm(u, u.shape[-1:], weight, settings.eps)
        return normed, pre.view(tokens, n), post.view(tokens, n), res[0].mT

    def post(x: Tensor, output: Tensor, post: Tensor, res: Tensor, **shared: Any) -> Tensor:
        options = dict(use_tf32=x.dtype != torch.float32, **shared)
        combine = theirs.mhc_fused_expand_combine
        return combine(output[None], None, post[None], x, res.mT[None], x.shape[-1], **options)[0].mT

    return Peer(streams, weights, pre, post, turned=True, shared=shared)


def tile_kernels(settings: Settings) -> Peer:
    """TileKernels' two functions (4 streams in bf16), with PyTorch's RMS norm of what the sub-layer reads."""
    from tile_kernels.modeling.mhc.functional import mhc_pre
    from tile_kernels.modeling.mhc.ops.post import mhc_post

    def weights(n: int, phi: Tensor, alpha: Tensor, bias: Tensor, weight: Tensor) -> Any:
        phi, bias = rows_first(phi, bias, n)
        return phi.mT.contiguous(), alpha, bias, weight

    def pre(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, weight: Tensor) -> Any:
        how = dict(norm_eps=settings.eps, pre_eps=0.0, sinkhorn_eps=settings.sinkhorn_eps)
        how |= dict(mhc_mult=x.shape[-2], post_mult_value=2.0, sinkhorn_repeat=settings.num_iters)
        u, (post, res) = mhc_pre(x, phi, alpha, bias, **how)
        return F.rms_norm(u[0], u.shape[-1:], weight, settings.eps), None, post[0, ..., 0], res[0].mT

    def post(x: Tensor, output: Tensor, post: Tensor, res: Tensor) -> Tensor:
        return mhc_post(output[None], x, post[None, ..., None], res.mT[None])[0]

    return Peer(lambda streams: streams[None], weights, pre, post, turned=True)


PEERS: dict[str, Callable[[Settings], Peer]] = {
    "Liger-Kernel": liger,
    "TransformerEngine": transformer_engine,
    "TileKernels": tile_kernels,
}
PEER_OPS = {peer: ("mix_pre", "mix_post", "sub_layer") for peer in PEERS} | {"TileKernels": ("mix_post", "sub_layer")}
"""The ops of ours that a peer has; TileKernels does not tell `pre`, and so gives it no gradient."""


def as_op(name: str, peer: Peer) -> Implementation:
    """A peer as one of `PEER_OPS`, with the arguments and outputs of ours."""

    def arrange_pre(streams: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return peer.streams(streams), *peer.weights(streams.shape[-2], *weights)

    def arrange_post(streams: Tensor, output: Tensor, post: Tensor, res: Tensor) -> tuple[Tensor, ...]:
        # What is transposed when it is run is contiguous then.
        return peer.streams(streams), output, post, res.mT.contiguous().mT if peer.turned else res

    def arrange(streams: Tensor, output: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        x, *own = arrange_pre(streams, *weights)
        return x, output, *own

    def sub_layer(x: Tensor, output: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        shared = peer.shared(x)
        normed, _, post, res = peer.pre(x, *weights, **shared)
        return normed, peer.post(x, output, post, res, **shared)

    if name == "mix_pre":
        return Implementation(peer.pre, arrange_pre)
    if name == "mix_post":
        return Implementation(lambda *inputs: (peer.post(*inputs),), arrange_post)
    return Implementation(sub_layer, arrange)
