"""Manifold-constrained hyper-connections: mappings, aggregate, combine, and the streams' entry and exit.

One sub-layer `F` (attention or MLP, with its pre-norm) on streams `x: [*b, n, c]`, arXiv 2512.24880 section 4:

    pre, post, res = mappings(x)
    u = Σ_j pre[j] · x[j]                             aggregate
    x'[i] = Σ_j res[i, j] · x[j] + post[i] · F(u)     combine

`res[i, j]` maps input stream j to output stream i and is applied as it stands, never transposed.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rlm_mhc.fn.norm import widen
from rlm_mhc.fn.sinkhorn import sinkhorn_knopp
from rlm_mhc.params import MHCParams
from rlm_mhc.types import Hidden, PerStream, StreamMatrix, Streams


class MHCMappings(NamedTuple):
    """`pre: [*b, n]` in (0, 1), `post: [*b, n]` in (0, 2), `res: [*b, n, n]` doubly stochastic; fp32 or wider."""

    pre: Tensor
    post: Tensor
    res: Tensor


def mhc_mappings(params: MHCParams, streams: Streams, *, num_iters: int = 20, eps: float = 1e-6) -> MHCMappings:
    """The three mappings of one sub-layer, a function of each token's own streams.

    `h = alpha · (v · phi) / sqrt(mean(v²) + eps) + bias` with `v` the streams flattened to `n·c`, split into
    pre `n` | post `n` | res `n²` (row-major); `pre = sigmoid`, `post = 2·sigmoid`, `res = sinkhorn_knopp`.
    All of it is computed in fp32 (fp64 stays fp64), whatever the dtype of the streams.

    Args:
        params: `phi [n·c, 2n+n²]`, `alpha [3]`, `bias [2n+n²]`.
        streams: `[*b, n, c]`.
        num_iters: Sinkhorn iterations.
        eps: added to the mean square.

    Raises:
        ValueError: when `phi` does not fit the streams.

    >>> import torch; from rlm_mhc import fn, ModelConfig
    >>> layer = fn.init(ModelConfig.preset("tiny")).layers[0]
    >>> fn.mhc_mappings(layer.attn_mhc, torch.randn(2, 5, 4, 128)).res.shape
    torch.Size([2, 5, 4, 4])
    """
    n, c = streams.shape[-2:]
    if params.phi.shape != (n * c, 2 * n + n * n):
        needed = (n * c, 2 * n + n * n)
        raise ValueError(f"phi is {tuple(params.phi.shape)}, but streams of n={n}, c={c} need [n·c, 2n+n²] = {needed}")
    raw = _project(streams.flatten(-2), params.phi, eps)
    pre, post, logits = activate(raw, params.alpha, params.bias)
    return MHCMappings(pre, post, sinkhorn_knopp(logits, num_iters=num_iters))


def _project(flat: Float[Tensor, "*b nc"], phi: Float[Tensor, "nc m"], eps: float) -> Float[Tensor, "*b m"]:
    wide = widen(flat)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    with torch.autocast(flat.device.type, enabled=False):
        # Dividing after the product is the same, and a kernel needs only one pass over the streams for it.
        return scale * (wide @ phi.to(wide.dtype))


def activate(
    raw: Float[Tensor, "*b m"], alpha: Float[Tensor, " 3"], bias: Float[Tensor, " m"]
) -> tuple[PerStream, PerStream, StreamMatrix]:
    """From `v · phi / rms(v)` to `pre`, `post` and the logits of `res`; see `mhc_mappings`."""
    n = math.isqrt(1 + raw.shape[-1]) - 1
    sizes = [n, n, n * n]
    parts = zip(alpha.unbind(), raw.split(sizes, -1), bias.split(sizes), strict=True)
    pre, post, res = [a * x + b for a, x, b in parts]
    return torch.sigmoid(pre), 2 * torch.sigmoid(post), res.unflatten(-1, (n, n))


def mhc_aggregate(streams: Streams, pre: PerStream) -> Hidden:
    """`u = Σ_j pre[j] · streams[j]`: the input of the sub-layer, `[*b, c]` in the dtype of the streams.

    >>> mhc_aggregate(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 0.5]))
    tensor([2.5000, 4.0000])
    """
    return (pre.unsqueeze(-1) * streams).sum(-2).to(streams.dtype)


def mhc_combine(streams: Streams, output: Hidden, post: PerStream, res: StreamMatrix) -> Streams:
    """`streams'[i] = Σ_j res[i, j] · streams[j] + post[i] · output`, in the dtype of the streams.

    >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> mhc_combine(torch.tensor([[1.0], [2.0]]), torch.tensor([10.0]), torch.tensor([1.0, 0.0]), swap)
    tensor([[12.],
            [ 1.]])
    """
    mixed = post.unsqueeze(-1) * output.unsqueeze(-2)
    # One term per input stream: n is small, and a product of [n, n] by [n, c] per token would not fuse.
    for column, stream in zip(res.unbind(-1), streams.unbind(-2), strict=True):
        mixed = mixed + column.unsqueeze(-1) * stream.unsqueeze(-2)
    return mixed.to(streams.dtype)


def expand_streams(x: Hidden, n: int) -> Streams:
    """`n` equal streams: the entry of the network, `[*b, c] -> [*b, n, c]`, contiguous.

    >>> expand_streams(torch.ones(3), 2).shape
    torch.Size([2, 3])
    """
    if n < 1:
        raise ValueError(f"n={n}: expected at least one stream")
    return x.unsqueeze(-2).repeat_interleave(n, dim=-2)


def collapse_streams(streams: Streams) -> Hidden:
    """The mean over streams: the exit of the network, `[*b, n, c] -> [*b, c]`.

    >>> collapse_streams(torch.tensor([[1.0], [3.0]]))
    tensor([2.])
    """
    return widen(streams).mean(-2).to(streams.dtype)
