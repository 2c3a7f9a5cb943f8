"""Where numbers stop being finite: the first weight, the first layer of the forward, or the gradient of a layer."""

import math
from collections.abc import Sequence

import torch

from rlm_mhc import fn
from rlm_mhc.config import ModelConfig, TrainConfig
from rlm_mhc.fn import Batch, LMParams
from rlm_mhc.params import cast
from rlm_mhc.program.head import chunk_tokens, chunks
from rlm_mhc.program.precision import COMPUTE_DTYPE
from rlm_mhc.tree import named_leaves, tree_leaves


@torch.no_grad()
def first_nonfinite(
    params: LMParams, batch: Batch, config: ModelConfig, training: TrainConfig, norms: Sequence[float]
) -> str:
    """In words: the first cause that there is of a step without finite numbers.

    Args:
        params: the weights that the step ran with.
        batch: what it ran on.
        config: the model.
        training: for the precision, and the size of a microbatch.
        norms: of each layer's gradient.
    """
    for name, leaf in named_leaves(params).items():
        if not leaf.isfinite().all():
            return f"the weight {name} is not finite"
    compute = cast(params, config, COMPUTE_DTYPE[training.mixed_precision])
    device = compute.norm.weight.device
    for tokens in batch.tokens.to(device).split(training.batch_size):
        if found := _first_in_forward(compute, tokens, config):
            return found
    largest = max(range(len(norms)), key=lambda number: (_rank(norms[number]), number))
    return f"the forward is finite; the largest gradient is that of layer {largest}, {norms[largest]:g}"


def _first_in_forward(params: LMParams, tokens: torch.Tensor, config: ModelConfig) -> str | None:
    context = fn.positions(tokens, config)
    hidden = fn.embed(params, tokens, config)
    largest = _largest(hidden)
    for number, layer in enumerate(params.layers):
        before, hidden = largest, fn.block(layer, hidden, context, config).hidden
        largest = _largest(hidden)
        if not math.isfinite(largest):
            return f"layer {number} is the first whose output is not finite (its input goes up to {before:.3g})"
    for rows in chunks(hidden, chunk_tokens(tokens.numel(), config.vocab_size, tokens.device.type)):
        if not math.isfinite(_largest(fn.head(params, rows, config))):
            return f"the logits are not finite (the head's input goes up to {largest:.3g})"
    return None


def _largest(hidden: object) -> float:
    """The largest absolute entry; nan where there is one."""
    return max((leaf.abs().max().item() for leaf in tree_leaves(hidden)), key=_rank)


def _rank(value: float) -> float:
    """Numbers, then infinity, then nan."""
    return math.inf if math.isnan(value) else math.nextafter(math.inf, 0) if math.isinf(value) else value
