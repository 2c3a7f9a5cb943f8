"""One microbatch: embed, blocks, head, and back, each tensor freed when nothing reads it any more."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlm_mhc.fn.layout import packed
from rlm_mhc.fn.loss import Batch
from rlm_mhc.fn.mhc import Hidden
from rlm_mhc.params import LMParams
from rlm_mhc.program.functions import Functions
from rlm_mhc.program.head import run_head
from rlm_mhc.program.monitors import Sampled, join
from rlm_mhc.stage import Weights


def run_microbatch(
    run: Functions,
    params: LMParams,
    weights: Callable[[int], Weights],
    count: int,
    batch: Batch,
    scale: Tensor,
    into: Any,
    add: Callable[[int, Any], object],
    period: int,
) -> tuple[Tensor, Sampled]:
    """`scale ·` the sum of token losses, and what is monitored.

    Args:
        run: the model's functions.
        params: the model's; its layers are not looked at.
        weights: of a layer by its number, by name.
        count: how many layers there are.
        batch: tokens and targets `[b, s]`.
        scale: 0-d.
        into: the gradients of what is not a layer are added to it; see `run_head`.
        add: called as `add(index, gradients)` when those of a layer are complete, from the last layer to the first.
        period: of `checkpoint_interval`.
    """
    states: dict[int, Hidden] = {}
    kept: dict[int, Any] = {}
    sampled: list[Sampled] = []
    hidden = run.embed(params.embed_tokens.weight, batch.tokens)
    for index in range(count):
        if index % period == 0:
            states[index] = hidden
        hidden, kept[index], of_layer = run.forward(weights(index), hidden)
        sampled.append(of_layer)
    loss, cotangent = run_head(run.head, params, into, hidden, batch.targets, scale)
    del hidden
    for index in reversed(range(count)):
        if index not in states:
            for i in range(index // period * period, index):
                states[i + 1] = run.replay(states[i], kept[i])
        grads, cotangent = run.backward(weights(index), states.pop(index), kept.pop(index), cotangent)
        add(index, grads)
        del grads
    if not isinstance(into, LMParams):
        return loss, join(sampled)
    # A token may occur thousands of times: its rows are summed in fp32, in any precision.
    streams = cotangent.x
    wide = torch.promote_types(streams.dtype, torch.float32)
    rows = streams.sum(-2, dtype=wide) if streams.dim() > 3 else streams.to(wide)
    _add_rows(into.embed_tokens.weight, batch.tokens.flatten(), rows.flatten(0, 1))
    return loss, join(sampled)


def _add_rows(matrix: Tensor, tokens: Tensor, rows: Tensor) -> None:
    """Add each row to that of its token, in a fixed order: compiled, it would be in the order of the threads."""
    if matrix.is_cpu:
        matrix.index_add_(0, tokens, rows)
    else:  # there index_add_ has no fixed order, and this has
        matrix.add_(torch.ops.aten.embedding_dense_backward(packed(rows), packed(tokens), len(matrix), -1, False))
