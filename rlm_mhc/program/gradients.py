"""Loss and gradients of a step: microbatches summed, each layer's gradient reduced as soon as it is complete."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.context import positions
from rlm_mhc.fn.kernels import Kernels
from rlm_mhc.fn.layout import unshared
from rlm_mhc.fn.lm import require_kind
from rlm_mhc.fn.loss import Batch
from rlm_mhc.fn.norm import widen
from rlm_mhc.fn.product import without_autocast
from rlm_mhc.params import LMParams
from rlm_mhc.program.functions import Functions, OnCompile, checkpoint_interval, make_functions
from rlm_mhc.program.head import equal_chunks, top_weights
from rlm_mhc.program.microbatch import run_microbatch
from rlm_mhc.program.monitors import Sampled
from rlm_mhc.program.weight_source import WeightSource, constant
from rlm_mhc.stage import Weights
from rlm_mhc.tree import named_leaves, ravel, rebuild, size, tree_leaves, tree_map, unravel

Reduce = Callable[[Tensor], Any]


class Gradients(NamedTuple):
    """`scale ×` the sum of token losses; its gradient, in the structure of what is trained; the tensors that this
    consists of, by layer and then those of the rest, which are fewer than its leaves where those are views of one
    vector; and what is monitored."""

    loss: Tensor
    grads: Any
    parts: list[list[Tensor]]
    sampled: Sampled


# The functions of a model for one shape of tokens, dtype and device.
ShapedFunctions = Callable[[torch.Size, torch.dtype, torch.device], Functions]


def shared_functions(
    config: ModelConfig,
    kernels: Kernels,
    *,
    flat: bool,
    remat: str = "none",
    compiled: bool = False,
    on_compile: OnCompile | None = None,
    weight_source: WeightSource | None = None,
    evaluates: bool = False,
) -> ShapedFunctions:
    """Return the functions of a model by shape, each compiled once for all that call it; see `make_functions`."""
    reads = weight_source.reads if weight_source else None

    @cache
    def functions(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Functions:
        return make_functions(
            config,
            kernels,
            remat,
            flat=flat and weight_source is None,
            compiled=compiled,
            on_compile=on_compile,
            reads=reads,
            evaluates=evaluates,
        )

    return functions


def make_loss_sum(config: ModelConfig, functions: ShapedFunctions) -> Callable[[LMParams, Batch], Tensor]:
    """`loss_sum(params, batch)`: the sum of the token losses of tokens and targets `[b, s]`, without gradients, in the
    dtypes of the weights, under any autocast. It runs the forward of the training step."""

    @torch.inference_mode(False)
    def loss_sum(params: LMParams, batch: Batch) -> Tensor:
        # Not under no_grad, for which the functions would be compiled anew: the weights are constants instead.
        params = tree_map(constant, params)
        require_kind(params, config)
        matrix = params.embed_tokens.weight
        run = functions(batch.tokens.shape, matrix.dtype, matrix.device)
        weights = _weights(None, params, positions(batch.tokens, config)[:2])
        with without_autocast(matrix.device.type):
            hidden = run.embed(matrix, batch.tokens)
            for index in range(len(params.layers)):
                hidden = run.forward(weights(index), hidden)[0]
            top = top_weights(params)
            chunks = equal_chunks(hidden, batch.targets, len(top[1]))
            parts = [run.loss(top, rows, wanted) for rows, wanted, _ in chunks]
        return torch.stack(parts).sum()

    return loss_sum


def make_gradients(
    config: ModelConfig,
    kernels: Kernels,
    *,
    reduce: Reduce | None = None,
    remat: str = "none",
    weight_source: WeightSource | None = None,
    functions: ShapedFunctions | None = None,
    **options: Any,
) -> Callable[[Any, Sequence[Batch], Tensor], Gradients]:
    """`gradients(trained, microbatches, scale)`: of `scale · Σ token losses` by every weight, in fp32 or wider.

    It runs in the dtypes of the weights, under any autocast.

    What is trained is the model's parameters, or what a `weight_source` makes them of. Then a layer's weights are
    made when it is run, once forward and once backward, and the gradients of them are pulled back when it is done.

    With `reduce` the gradient of a layer, summed over the microbatches, is one flat vector, and `reduce(vector)` is
    called while the layers before are still in backward, and for the rest at the end; it returns a vector, or a
    handle whose `wait()` does. `functions` come from `shared_functions`; None: make them with these `options`.
    """
    flat, period = reduce is not None, checkpoint_interval(config, remat)
    if functions is None:
        functions = shared_functions(config, kernels, flat=flat, remat=remat, weight_source=weight_source, **options)

    @torch.inference_mode(False)  # under it, `torch.func` of PyTorch 2.11 gives zeros
    def gradients(trained: Any, microbatches: Sequence[Batch], scale: Tensor) -> Gradients:
        trained = tree_map(constant, trained)
        params = weight_source.top(trained) if weight_source else trained
        require_kind(params, config)
        matrix, tokens = params.embed_tokens.weight, microbatches[0].tokens
        run = functions(tokens.shape, matrix.dtype, matrix.device)
        weights = _weights(weight_source, trained, positions(tokens, config)[:2])
        top = trained._replace(layers=())
        top_sum = torch.zeros(size(top), dtype=widen(matrix[:0]).dtype, device=matrix.device)
        count = len(trained.layers)
        sums: list[Any] = [None] * count
        pull = partial(_pull, weight_source, trained, flat) if weight_source else _same
        losses, monitored = [], []
        for number, batch in enumerate(microbatches):
            done = reduce if number == len(microbatches) - 1 else None
            add = partial(_add, sums, pull, done)
            into = unravel(top_sum, top)
            loss, sampled = run_microbatch(run, params, weights, count, batch, scale, into, add, period)
            losses.append(loss)
            monitored.append(sampled)
        sums.append([top_sum if reduce is None else reduce(top_sum)] if len(top_sum) else [])
        parts = [[wait(part) for part in of_layer] for of_layer in sums]
        grads = unravel(parts[-1][0] if parts[-1] else top_sum, top)._replace(
            layers=tuple(
                unravel(own[0], layer) if flat else rebuild(layer, iter(own))
                for own, layer in zip(parts[:-1], trained.layers, strict=True)
            )
        )
        sampled = tree_map(lambda *tokens: torch.cat(tokens), *monitored)
        return Gradients(torch.stack(losses).sum(), grads, parts, sampled)

    def in_its_own_precision(trained: Any, microbatches: Sequence[Batch], scale: Tensor) -> Gradients:
        with without_autocast(scale.device.type):
            return gradients(trained, microbatches, scale)

    return in_its_own_precision


def wait(vector: Any) -> Tensor:
    """A vector, or what a handle gives in the end."""
    return vector.wait() if hasattr(vector, "wait") else vector


def _weights(
    weight_source: WeightSource | None, trained: Any, rotary: tuple[Tensor, Tensor]
) -> Callable[[int], Weights]:
    """A layer's weights by its number: all at hand, or made when they are asked for."""
    fixed = dict(zip(("cos", "sin"), rotary, strict=True))
    if weight_source is None:
        return [named_leaves(layer) | fixed for layer in trained.layers].__getitem__
    make = weight_source.layer
    return lambda index: named_leaves(make(trained, index)) | fixed


def _same(index: int, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return grads


def _pull(
    weight_source: WeightSource, trained: Any, flat: bool, index: int, grads: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The gradients of what is trained of a layer, from those of its weights."""
    named = dict(zip(weight_source.reads, grads, strict=True))
    pulled = weight_source.pull(trained, index, named)
    return (ravel(pulled),) if flat else tuple(tree_leaves(pulled))


def _add(
    sums: list[Any],
    pull: Callable[[int, tuple[Tensor, ...]], tuple[Tensor, ...]],
    reduce: Reduce | None,
    index: int,
    grads: tuple[Tensor, ...],
) -> None:
    """Add a layer's gradients to its sum, and begin to reduce it where this is the last microbatch."""
    grads = pull(index, grads)
    if sums[index] is None:
        sums[index] = grads
    else:
        sums[index] = unshared(sums[index])
        torch._foreach_add_(sums[index], grads)
    if reduce is not None:
        sums[index] = [reduce(part) for part in sums[index]]
