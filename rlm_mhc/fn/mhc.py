"""Manifold-constrained hyper-connections: mappings, aggregate, combine, and the streams' entry and exit.

One sub-layer `F` (attention or MLP, with its pre-norm) on streams `x: [*b, n, c]`, arXiv 2512.24880 section 4:

    pre, post, res = mappings(x)
    u = Σ_j pre[j] · x[j]                             aggregate
    x'[i] = Σ_j res[i, j] · x[j] + post[i] · F(u)     combine

`res[i, j]` maps input stream j to output stream i and is applied as it stands, never transposed.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rlm_mhc.fn.norm import widen
from rlm_mhc.fn.product import product
from rlm_mhc.fn.projections import project
from rlm_mhc.fn.replaceable import replaceable
from rlm_mhc.params import MHCHead, MHCParams
from rlm_mhc.types import Activations, PerStream, StreamMatrix, Streams
from rlm_mhc.variants import PRESETS, preset_named, projection_named


class MHCMappings(NamedTuple):
    """`pre: [*b, n]` in (0, 1), `post: [*b, n]` in (0, 2), `res: [*b, n, n]` doubly stochastic; fp32 or wider.

    With the preset `hc` all three are unconstrained.
    """

    pre: Tensor
    post: Tensor
    res: Tensor


class Hidden(NamedTuple):
    """State between sub-layers: streams `x [*b, n, c]`, without mHC `[*b, c]`; and `pre [*b, n]` of the next one where
    it comes early, in the preset `single_pass`, else `()`."""

    x: Tensor
    pre: Tensor | tuple[()] = ()


def mhc_mappings(
    params: MHCParams,
    streams: Streams,
    *,
    num_iters: int = 20,
    eps: float = 1e-6,
    preset: str = "paper",
    projection: str | None = None,
) -> MHCMappings:
    """The three mappings of one sub-layer, a function of each token's own streams.

    `h = alpha · (v · phi) / sqrt(mean(v²) + eps) + bias` with `v` the streams flattened to `n·c`, split into
    pre `n` | post `n` | res `k`; `pre = sigmoid(h)`, `post = 2·sigmoid(h)`, `res = project(h)`. Of the preset `paper`
    `res = sinkhorn_knopp(h)`, `h` being row-major. `deepseek_v4` and `single_pass` add 1e-6 to `pre` and in every
    sum of Sinkhorn; of `single_pass` this `pre` is for the next sub-layer. `hc` has
    `h = alpha · tanh((v · phi) / …) + bias`, and `pre`, `post`, `res` are `h`.
    All of it is computed in fp32 (fp64 stays fp64), whatever the dtype of the streams and under any autocast.

    Args:
        params: `phi [n·c, 2n+k]`, `alpha [3]`, `bias [2n+k]`.
        streams: `[*b, n, c]`.
        num_iters: Sinkhorn iterations.
        eps: added to the mean square.
        preset: a row of `rlm_mhc.variants.PRESETS`.
        projection: see `fn.project`; None: that of the preset.

    Raises:
        ValueError: when `phi` does not fit the streams, or on an unknown name.

    >>> import torch; from rlm_mhc import fn, ModelConfig
    >>> layer = fn.init(ModelConfig.preset("tiny")).layers[0]
    >>> fn.mhc_mappings(layer.attn_mhc, torch.randn(2, 5, 4, 128)).res.shape
    torch.Size([2, 5, 4, 4])
    """
    n, row = streams.shape[-2], preset_named(preset)
    projection = projection or row.projection
    pre, post, raw = unprojected(params, streams, eps=eps, preset=preset, projection=projection)
    return MHCMappings(pre, post, project(raw, n, projection, num_iters=num_iters, eps=row.eps))


def unprojected(
    params: MHCParams, streams: Streams, *, eps: float, preset: str, projection: str
) -> tuple[PerStream, PerStream, Float[Tensor, "*b k"]]:
    """`pre`, `post` and the raw numbers that `res` is made of; see `mhc_mappings`."""
    n, c = streams.shape[-2:]
    size = 2 * n + projection_named(projection).raw_size(n)
    if params.phi.shape != (n * c, size):
        form = "[n·c, 2n+n²]" if size == 2 * n + n * n else f"[n·c, 2n+k] with the k of {projection}"
        raise ValueError(f"phi is {tuple(params.phi.shape)}, but streams of n={n}, c={c} need {form} = {(n * c, size)}")
    h = _project(streams.flatten(-2), params.phi, eps)
    return activate(h, params.alpha, params.bias, n, preset)


def _project(flat: Float[Tensor, "*b nc"], phi: Float[Tensor, "nc m"], eps: float) -> Float[Tensor, "*b m"]:
    wide = widen(flat)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    # Dividing after the product is the same, and a kernel needs only one pass over the streams for it.
    return scale * product(wide, phi.to(wide.dtype))


def activate(
    h: Float[Tensor, "*b m"],
    alpha: Float[Tensor, " 3"],
    bias: Float[Tensor, " m"],
    n: int,
    preset: str = "paper",
) -> tuple[PerStream, PerStream, Float[Tensor, "*b k"]]:
    """From `v · phi / rms(v)` to `pre`, `post` and the raw numbers of `res`; see `mhc_mappings`."""
    row = PRESETS[preset]
    if row.gates == "tanh":
        h = torch.tanh(h)
    sizes = [n, n, h.shape[-1] - 2 * n]
    parts = zip(alpha.unbind(), h.split(sizes, -1), bias.split(sizes), strict=True)
    pre, post, raw = [a * x + b for a, x, b in parts]
    if row.gates == "tanh":
        return pre, post, raw
    pre = torch.sigmoid(pre)
    return pre + row.eps if row.eps else pre, 2 * torch.sigmoid(post), raw


def mhc_aggregate(streams: Streams, pre: PerStream) -> Activations:
    """`u = Σ_j pre[j] · streams[j]`: the input of the sub-layer, `[*b, c]` in the dtype of the streams.

    >>> mhc_aggregate(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 0.5]))
    tensor([2.5000, 4.0000])
    """
    return (pre.unsqueeze(-1) * streams).sum(-2).to(streams.dtype)


def mhc_combine(streams: Streams, output: Activations, post: PerStream, res: StreamMatrix) -> Streams:
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


def expand_streams(x: Activations, n: int) -> Streams:
    """`n` equal streams: the entry of the network, `[*b, c] -> [*b, n, c]`, contiguous.

    >>> expand_streams(torch.ones(3), 2).shape
    torch.Size([2, 3])
    """
    if n < 1:
        raise ValueError(f"n={n}: expected at least one stream")
    return x.unsqueeze(-2).repeat_interleave(n, dim=-2)


def collapse_streams(streams: Streams) -> Activations:
    """The mean over streams: the exit of the network, `[*b, n, c] -> [*b, c]`.

    >>> collapse_streams(torch.tensor([[1.0], [3.0]]))
    tensor([2.])
    """
    return widen(streams).mean(-2).to(streams.dtype)


@replaceable(1)
def collapse_learned(
    params: MHCHead, streams: Streams, *, eps: float = 1e-6, preset: str = "deepseek_v4"
) -> Activations:
    """`Σ_j w[j] · streams[j]`, `w = sigmoid(alpha · (v · phi) / sqrt(mean(v²) + eps) + bias)` plus the preset's eps.

    Source: transformers' DeepseekV4HyperHead.

    >>> head = MHCHead(torch.zeros(2, 2), torch.ones(1), torch.zeros(2))
    >>> collapse_learned(head, torch.tensor([[1.0], [3.0]]))
    tensor([2.0000])
    """
    h = _project(streams.flatten(-2), params.phi, eps)
    return mhc_aggregate(streams, torch.sigmoid(params.alpha * h + params.bias) + PRESETS[preset].eps)
