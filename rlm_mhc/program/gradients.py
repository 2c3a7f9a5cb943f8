"""Loss and gradients of a step: microbatches summed, each layer's gradient reduced as soon as it is complete."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.kernels import Kernels
from rlm_mhc.fn.lm import positions, require_kind
from rlm_mhc.fn.loss import Batch
from rlm_mhc.fn.norm import widen
from rlm_mhc.params import LMParams
from rlm_mhc.program.functions import Announce, Functions, make_functions, stored_every
from rlm_mhc.program.microbatch import run_microbatch
from rlm_mhc.program.monitors import Sampled
from rlm_mhc.tree import named_leaves, rebuild, size, tree_map, unravel

Reduce = Callable[[Tensor], Any]


class Gradients(NamedTuple):
    """`scale ×` the sum of token losses; its gradient; the tensors that this consists of, by layer and then those of
    the rest, which are fewer than its leaves where those are views of one vector; and what is monitored."""

    loss: Tensor
    grads: LMParams
    parts: list[list[Tensor]]
    sampled: Sampled


def make_gradients(
    config: ModelConfig,
    kernels: Kernels,
    *,
    reduce: Reduce | None = None,
    remat: str = "none",
    compiled: bool = False,
    announce: Announce | None = None,
) -> Callable[[LMParams, Sequence[Batch], Tensor], Gradients]:
    """`gradients(params, microbatches, scale)`: of `scale · Σ token losses` by every parameter, in fp32 or wider.

    With `reduce` the gradient of a layer, summed over the microbatches, is one flat vector, and `reduce(vector)` is
    called while the layers before are still in backward, and for the rest at the end; it returns a vector, or a
    handle whose `wait()` does.
    """
    flat, period = reduce is not None, stored_every(config, remat)

    @cache
    def functions(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Functions:
        return make_functions(config, kernels, remat, flat=flat, compiled=compiled, announce=announce)

    def gradients(params: LMParams, microbatches: Sequence[Batch], scale: Tensor) -> Gradients:
        require_kind(params, config)
        matrix, tokens = params.embed_tokens.weight, microbatches[0].tokens
        run = functions(tokens.shape, matrix.dtype, matrix.device)
        cos, sin = positions(tokens, config)
        layers = [named_leaves(layer) | {"cos": cos, "sin": sin} for layer in params.layers]
        top = params._replace(layers=())
        top_sum = torch.zeros(size(top), dtype=widen(matrix[:0]).dtype, device=matrix.device)
        sums: list[Any] = [None] * len(layers)
        losses, monitored = [], []
        for number, batch in enumerate(microbatches):
            done = reduce if number == len(microbatches) - 1 else None
            add = partial(_add, sums, done)
            loss, sampled = run_microbatch(run, params, layers, batch, scale, unravel(top_sum, top), add, period)
            losses.append(loss)
            monitored.append(sampled)
        sums.append([top_sum if reduce is None else reduce(top_sum)])
        parts = [[wait(part) for part in of_layer] for of_layer in sums]
        grads = unravel(parts[-1][0], top)._replace(
            layers=tuple(
                unravel(own[0], layer) if flat else rebuild(layer, iter(own))
                for own, layer in zip(parts[:-1], params.layers, strict=True)
            )
        )
        sampled = tree_map(lambda *tokens: torch.cat(tokens), *monitored)
        return Gradients(torch.stack(losses).sum(), grads, parts, sampled)

    return gradients


def wait(vector: Any) -> Tensor:
    """A vector, or what a handle gives in the end."""
    return vector.wait() if hasattr(vector, "wait") else vector


def _add(sums: list[Any], reduce: Reduce | None, index: int, grads: tuple[Tensor, ...]) -> None:
    """Add a layer's gradients to its sum, and begin to reduce it where this is the last microbatch."""
    if sums[index] is None:
        sums[index] = grads
    else:
        torch._foreach_add_(sums[index], grads)
    if reduce is not None:
        sums[index] = [reduce(part) for part in sums[index]]
