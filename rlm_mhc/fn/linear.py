"""Products with a weight."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from rlm_mhc.fn.replaceable import replaceable
from rlm_mhc.params import Embedding, Linear


@replaceable(1)
def linear(params: Linear, x: Float[Tensor, "*b in"]) -> Float[Tensor, "*b out"]:
    """`x · weightᵀ + bias`; or `params(x)`, see `replaceable`.

    >>> import torch
    >>> linear(Linear(torch.ones(2, 3)), torch.ones(3)), linear(lambda x: 2 * x, torch.ones(1))
    (tensor([3., 3.]), tensor([2.]))
    """
    # Vectors of a model may have a wider dtype than its matrices, which a product does not take.
    return F.linear(x, params.weight, params.bias.to(x.dtype) if isinstance(params.bias, Tensor) else None)


@replaceable(1)
def embedding(params: Embedding, tokens: Int[Tensor, "*b s"]) -> Float[Tensor, "*b s c"]:
    """The row of each token; or `params(tokens)`, see `replaceable`.

    >>> import torch
    >>> embedding(Embedding(torch.eye(2)), torch.tensor([1]))
    tensor([[0., 1.]])
    """
    return F.embedding(tokens, params.weight)
