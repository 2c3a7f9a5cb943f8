"""Loss and gradients of a microbatch, layer by layer: every layer runs the same compiled function."""

import types
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.block import block
from rlm_mhc.fn.kernels import Kernels
from rlm_mhc.fn.lm import embed, head, positions
from rlm_mhc.fn.loss import Batch, token_loss_sum
from rlm_mhc.params import Layer, LMParams
from rlm_mhc.tree import tree_flatten, tree_unflatten
from rlm_mhc.types import RotaryTable, Scalar, Tokens

F = TypeVar("F", bound=Callable)
SAMPLED_TOKENS = 64


class Gradients(NamedTuple):
    """`scale ×` the sum of token losses, its gradient, and `res` at sampled tokens, each `[tokens, n, n]`."""

    loss: Tensor
    grads: LMParams
    res: tuple[Tensor, ...]


def make_gradients(
    config: ModelConfig, kernels: Kernels, compiled: bool
) -> Callable[[LMParams, Batch, Scalar], Gradients]:
    """`gradients(params, batch, scale)`: of `scale · Σ token losses` with respect to every parameter.

    With `compiled`, one graph serves all layers and one the head, so that compile time does not grow with depth.
    """

    def run_block(layer: Layer, hidden: Tensor, cos: RotaryTable, sin: RotaryTable) -> tuple[Tensor, list[Tensor]]:
        out = block(layer, hidden, cos, sin, config, kernels)
        return out.hidden, [_sample(res) for res in out.res]

    def run_head(top: LMParams, hidden: Tensor, targets: Tokens, scale: Scalar) -> Tensor:
        return scale * token_loss_sum(head(top, hidden, config, kernels), targets)

    if compiled:
        run_block, run_head = _compile(run_block), _compile(run_head)

    def gradients(params: LMParams, batch: Batch, scale: Scalar) -> Gradients:
        leaves, spec = tree_flatten(params)
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        params = tree_unflatten(leaves, spec)
        cos, sin = positions(batch.tokens, config)
        hidden = embed(params, batch.tokens, config)
        res: list[Tensor] = []
        for layer in params.layers:
            hidden, sampled = run_block(layer, hidden, cos, sin)
            res += sampled
        loss = run_head(params._replace(layers=()), hidden, batch.targets, scale)
        grads = torch.autograd.grad(loss, leaves)
        return Gradients(loss.detach(), tree_unflatten(list(grads), spec), tuple(res))

    return gradients


def _sample(res: Tensor) -> Tensor:
    matrices = res.detach().flatten(0, -3)
    return matrices[:: max(1, len(matrices) // SAMPLED_TOKENS)]


def _compile(f: F) -> Any:
    # Dynamo counts recompilations per code object: without one of its own, the ninth program of a process fails.
    own = types.FunctionType(f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False)
