"""How much the residual mappings of all layers together can amplify a signal."""

from jaxtyping import Float
from torch import Tensor


def composite_gain(res: Float[Tensor, "layers *b out=n in=n"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
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
    if not len(res):
        raise ValueError("composite_gain needs the mappings of at least one layer, got none")
    product = res[0]
    for matrix in res[1:]:
        product = matrix @ product
    return product.sum(-1).abs().amax(-1), product.sum(-2).abs().amax(-1)
