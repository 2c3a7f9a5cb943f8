"""Parametrisations of the Birkhoff polytope: from raw numbers `[*b, k]` to doubly stochastic matrices `[*b, n, n]`.

| projection | raw numbers k | n | row and column sums | multiply-adds forward |
|---|---|---|---|---|
| `sinkhorn` | n² | any | rows 1 to rounding, columns as far as the iterations got | 4·n²·iterations |
| `permutations` | n! | 1 to 4 | 1 to rounding | n²·n! |
| `kronecker` | log₂ n | powers of 2 | 1 to rounding | about 4n²/3 |
| `orthostochastic` | 2n² - n | any | 1 to rounding, computed in fp64 | about 11·n³ + 4n² |
| `identity` | 0 | any | exactly 1 | none |

`sinkhorn`, `permutations` and, in the limit of large blocks, `orthostochastic` reach every doubly stochastic matrix;
`kronecker` a log₂(n)-dimensional part. `unconstrained`, the raw numbers themselves, is there for the preset `hc`.
"""

import itertools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from rlm_mhc.fn.norm import widen
from rlm_mhc.fn.sinkhorn import sinkhorn_knopp
from rlm_mhc.types import StreamMatrix
from rlm_mhc.variants import ORTHOSTOCHASTIC_BLOCK, projection_named

Raw = Float[Tensor, "*b k"]
LARGEST_SKEW = 1e6


def project(
    raw: Raw,
    n: int,
    projection: str = "sinkhorn",
    *,
    num_iters: int = 20,
    tolerance: float | None = None,
    eps: float = 0.0,
) -> StreamMatrix:
    """The matrix `[*b, n, n]` of raw numbers `[*b, k]`, in fp32 (fp64 stays fp64), finite for any finite numbers.

    Args:
        raw: `[*b, k]`, `k = PROJECTIONS[projection].raw_size(n)`.
        n: streams.
        projection: a name of the table above.
        num_iters: of `sinkhorn`, as are `tolerance` and `eps`; see `fn.sinkhorn_knopp`. Others ignore them.
        tolerance: see there.
        eps: see there.

    Raises:
        ValueError: on an unknown name, an `n` that the projection has no form for, or another `k`.

    >>> project(torch.zeros(2), 4, "kronecker")[0]
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    rule = projection_named(projection)
    if not rule.fits(n):
        raise ValueError(f"n={n}: {projection} needs {rule.needs}")
    if raw.shape[-1] != rule.raw_size(n):
        raise ValueError(f"raw numbers [*b, {raw.shape[-1]}]: {projection} of n={n} needs [*b, {rule.raw_size(n)}]")
    wide = widen(raw)
    if projection == "sinkhorn":
        return sinkhorn_knopp(wide.unflatten(-1, (n, n)), num_iters=num_iters, tolerance=tolerance, eps=eps)
    return _EXACT[projection](wide, n)


def permutation_mixture(raw: Raw, n: int) -> StreamMatrix:
    """`Σ_p softmax(raw)[p] · P_p` over all `n!` permutation matrices, the identity first (mHC-lite, arXiv 2601.05732).

    >>> permutation_mixture(torch.tensor([40.0, 0.0]), 2)
    tensor([[1.0000e+00, 4.2484e-18],
            [4.2484e-18, 1.0000e+00]])
    """
    orders = list(itertools.permutations(range(n)))
    matrices = torch.tensor([[float(order[i] == j) for i in range(n) for j in range(n)] for order in orders])
    return (raw.softmax(-1) @ matrices.to(raw)).unflatten(-1, (n, n))


def kronecker_product(raw: Raw, n: int) -> StreamMatrix:
    """`⊗_f [[a_f, 1 - a_f], [1 - a_f, a_f]]`, `a = sigmoid(raw)`, one factor per doubling (arXiv 2601.21579).

    >>> kronecker_product(torch.tensor([0.0]), 2)
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    same, other = torch.sigmoid(raw), torch.sigmoid(-raw)
    factors = torch.stack([same, other, other, same], -1).unflatten(-1, (2, 2))
    product = raw.new_ones(*raw.shape[:-1], 1, 1)
    for factor in factors.unbind(-3):
        product = torch.einsum("...ij,...kl->...ikjl", product, factor).flatten(-2).flatten(-3, -2)
    return product


def orthostochastic(raw: Raw, n: int, *, block: int = ORTHOSTOCHASTIC_BLOCK) -> StreamMatrix:
    """`res[i, j] = ‖Q_ij‖² / block`, `Q_ij` the `block × block` parts of an orthogonal matrix (arXiv 2604.02309).

    `Q = (I + X)⁻¹ (I - X) = 2 (I + X)⁻¹ - I`, the Cayley map of the skew-symmetric `X` whose upper triangle holds the
    raw numbers, row by row. With `block=1` these are the orthostochastic matrices; larger blocks fill more of the
    polytope. It is computed in fp64, and numbers beyond ±10⁶ count as that, so that `Q` is orthogonal to 1e-9 at worst.

    >>> orthostochastic(torch.zeros(6), 2)
    tensor([[1., 0.],
            [0., 1.]])
    """
    wide = n * block
    rows, columns = torch.triu_indices(wide, wide, 1, device=raw.device)
    where = torch.zeros(wide, wide, dtype=torch.int64, device=raw.device)
    order = torch.arange(raw.shape[-1], device=raw.device)
    where = where.index_put((rows, columns), order).index_put((columns, rows), order)
    ones = torch.ones(wide, wide, dtype=torch.float64, device=raw.device)
    bounded = raw.double().clamp(-LARGEST_SKEW, LARGEST_SKEW)
    skew = bounded[..., where.flatten()].unflatten(-1, (wide, wide)) * (ones.triu(1) - ones.tril(-1))
    identity = torch.eye(wide, dtype=torch.float64, device=raw.device)
    # Not solve: its second derivative in forward mode is wrong (torch 2.13).
    q = 2 * torch.linalg.inv(identity + skew) - identity
    squares = q.square().unflatten(-1, (n, block)).unflatten(-3, (n, block))
    return (squares.sum((-3, -1)) / block).to(raw.dtype)


def identity_matrix(raw: Raw, n: int) -> StreamMatrix:
    """The identity for every token; `raw` is `[*b, 0]`.

    >>> identity_matrix(torch.zeros(5, 0), 2).shape
    torch.Size([5, 2, 2])
    """
    return torch.eye(n, dtype=raw.dtype, device=raw.device).expand(*raw.shape[:-1], n, n)


def unconstrained(raw: Raw, n: int) -> StreamMatrix:
    """The raw numbers, row by row: what mHC constrains (arXiv 2409.19606).

    >>> unconstrained(torch.arange(4.0), 2)
    tensor([[0., 1.],
            [2., 3.]])
    """
    return raw.unflatten(-1, (n, n))


_EXACT: dict[str, Callable[[Tensor, int], Tensor]] = {
    "permutations": permutation_mixture,
    "kronecker": kronecker_product,
    "orthostochastic": orthostochastic,
    "identity": identity_matrix,
    "unconstrained": unconstrained,
}
