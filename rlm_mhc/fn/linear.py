"""Products with a weight, the one place where a model may have something else in a weight's stead."""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from rlm_mhc.params import Embedding, Linear

Map = Callable[[Tensor], Tensor]


def linear(params: Linear | Map, x: Float[Tensor, "*b in"]) -> Float[Tensor, "*b out"]:
    """`x · weightᵀ + bias`, or `params(x)` where a function stands in for the weight: an adapter, a quantised layer.

    >>> import torch
    >>> linear(Linear(torch.ones(2, 3)), torch.ones(3)), linear(lambda x: 2 * x, torch.ones(1))
    (tensor([3., 3.]), tensor([2.]))
    """
    if not isinstance(params, Linear):
        return params(x)
    # Vectors of a model may have a wider dtype than its matrices, which a product does not take.
    return F.linear(x, params.weight, params.bias.to(x.dtype) if isinstance(params.bias, Tensor) else None)


def embedding(params: Embedding | Map, tokens: Int[Tensor, "*b s"]) -> Float[Tensor, "*b s c"]:
    """The row of each token, or `params(tokens)` where a function stands in for the weight.

    >>> import torch
    >>> embedding(Embedding(torch.eye(2)), torch.tensor([1]))
    tensor([[0., 1.]])
    """
    return F.embedding(tokens, params.weight) if isinstance(params, Embedding) else params(tokens)
