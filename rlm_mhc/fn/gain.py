"""What the residual mappings do to a signal: gains of their products, their distance from doubly stochastic, and how
evenly the streams share what they carry."""

import torch
from jaxtyping import Float
from torch import Tensor

from rlm_mhc.fn.norm import widen
from rlm_mhc.fn.product import product
from rlm_mhc.types import StreamMatrix, Streams

Res = Float[Tensor, "layers *b out=n in=n"]
PerLayer = Float[Tensor, "layers *b"]


def composite_gain(res: Res) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """Gains of the product `res[-1] · … · res[0]`: largest absolute row sum (forward) and column sum (backward).

    Both are 1 for exactly doubly stochastic matrices; arXiv 2512.24880 (Amax gain magnitude) reports up to about
    3000 for unconstrained hyper-connections and 1.6 for mHC.

    Args:
        res: `[layers, *b, n, n]` in the order in which the sub-layers run, at least one.

    Returns:
        `(forward, backward)`, each `[*b]`.

    Raises:
        ValueError: when there is no layer.

    >>> import torch
    >>> composite_gain(torch.eye(3).expand(5, 3, 3))
    (tensor(1.), tensor(1.))
    """
    _require_layers(res)
    whole = res[0]
    for matrix in res[1:]:
        whole = product(matrix, whole)
    return _row_gain(whole), _row_gain(whole.mT)


def cumulative_gain(res: Res) -> tuple[PerLayer, PerLayer]:
    """`composite_gain` up to and from each sub-layer: forward of `res[l] · … · res[0]`, backward of
    `res[-1] · … · res[l]`, which is what a gradient has been multiplied by when it arrives below sub-layer `l`.

    The products are taken by doubling: `log₂(layers)` batched products each way.

    Args:
        res: as in `composite_gain`.

    Returns:
        `(forward, backward)`, each `[layers, *b]`; `forward[-1]` and `backward[0]` are those of `composite_gain`.

    Raises:
        ValueError: when there is no layer.

    >>> import torch
    >>> cumulative_gain(torch.tensor([[[2.0]], [[3.0]]]))
    (tensor([2., 6.]), tensor([6., 3.]))
    """
    _require_layers(res)
    below, above = res, res
    reach = 1
    while reach < len(res):
        below = torch.cat([below[:reach], product(below[reach:], below[:-reach])])
        above = torch.cat([product(above[reach:], above[:-reach]), above[-reach:]])
        reach *= 2
    return _row_gain(below), _row_gain(above.mT)


def stochasticity_error(res: StreamMatrix) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """`(rows, columns)`: how far the sum of a row, of a column, is from 1 at most.

    >>> import torch
    >>> stochasticity_error(torch.tensor([[0.5, 0.5], [0.0, 1.0]]))
    (tensor(0.), tensor(0.5000))
    """
    rows, columns = ((res.sum(axis) - 1).abs().amax(-1) for axis in (-1, -2))
    return rows, columns


def stream_dominance(streams: Streams) -> Float[Tensor, "*b"]:
    """The largest stream's share of all streams' squares: 1/n where they are equally large, 1 where one has it all.

    >>> import torch
    >>> stream_dominance(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    tensor(1.)
    """
    squares = widen(streams).square().sum(-1)
    return squares.amax(-1) / squares.sum(-1).clamp(min=torch.finfo(squares.dtype).tiny)


def _require_layers(res: Tensor) -> None:
    if not len(res):
        raise ValueError("a gain needs the mappings of at least one layer, got none")


def _row_gain(product: Tensor) -> Tensor:
    return product.sum(-1).abs().amax(-1)
