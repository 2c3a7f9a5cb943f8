"""Bytes that a step keeps and works with, counted on the program itself with tensors that have no storage."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.kernels import REFERENCE, Kernels
from rlm_mhc.fn.rope import rotary_table
from rlm_mhc.params import init
from rlm_mhc.program.functions import checkpoint_interval, make_functions
from rlm_mhc.program.head import chunk_tokens
from rlm_mhc.stage import stage_of
from rlm_mhc.tree import named_leaves, size, tree_leaves, tree_map


class Activations(NamedTuple):
    """Bytes: `kept` between forward and backward of one microbatch; beside it, what the `head` works with, and what
    the backward of one `layer` does."""

    kept: int
    head: int
    layer: int

    def peak(self, gradients: int, top: int, layers: int, accumulated: bool) -> int:
        """The most that is alive at once, gradients included.

        That is at the head, or in the first or the last layer of the backward. `gradients` bytes of them there are in
        the end, `top` of them not of layers; with `accumulated` all from the start.
        """
        first = gradients if accumulated else top
        one = (gradients - top) // layers
        return max(first + self.kept + max(self.head, self.layer + one), gradients + self.layer)


def count_activations(
    config: ModelConfig,
    batch_size: int,
    length: int,
    compute: torch.dtype,
    remat: str,
    device: str,
    kernels: Kernels = REFERENCE,
    *,
    embedding_trained: bool = True,
    compiled: bool = True,
) -> Activations:
    """What one microbatch of a step needs beyond weights, gradients and optimizer.

    `kept` is exact, that of fused mixing too. The head works with a chunk's logits and their cotangent, a layer's
    backward with its own cotangents, the fp32 copies that its mappings are computed from (of which fused mixing makes
    none, but partial sums of `phi`'s gradient), and whatever `remat` builds again.
    """
    with FakeTensorMode():
        params = tree_map(
            lambda w: torch.empty_like(w, device="cpu"),
            init(config.replace(num_layers=1), device="meta", dtype=compute),
        )
        run = make_functions(config, kernels, "mhc" if remat == "mhc" else "none")
        cos, sin = rotary_table(torch.zeros(length, dtype=torch.int64, device="cpu"), config.head_width)
        tokens = torch.zeros(batch_size, length, dtype=torch.int64, device="cpu")
        hidden = run.embed(params.embed_tokens.weight, tokens)
        _, residuals, _ = run.forward(named_leaves(params.layers[0]) | {"cos": cos, "sin": sin}, hidden)
        state, layer = _bytes(hidden), _bytes(residuals)
    layers, wide = config.num_layers, 4 * size(hidden)
    period = checkpoint_interval(config, remat)
    kept = math.ceil(layers / period) * state + (0 if remat == "full" else layers * layer)
    rebuilt = layer if remat == "full" else (period - 1) * state
    logits = chunk_tokens(tokens.numel(), config.vocab_size, device) * config.vocab_size
    backward = 2 * state + _mixing(config, kernels, state, wide) + rebuilt
    matrix = compute.itemsize * config.vocab_size * config.hidden_dim
    embedding = 4 * config.vocab_size * config.hidden_dim
    if not embedding_trained:
        matrix = embedding = 0
    # Uncompiled: logits, log-probabilities and both cotangents are live at once; the norm holds its input twice.
    head = state + 4 * logits if compiled else 2 * (state + wide) + 16 * logits
    return Activations(kept, head + matrix, max(backward, state + embedding))


def _mixing(config: ModelConfig, kernels: Kernels, state: int, wide: int) -> int:
    """What the backward of a sub-layer's mixing works with beside two states."""
    if not config.mhc_enabled:
        return 0
    if kernels.block is None:
        return 2 * wide
    return 2 * state // config.mhc_flows + stage_of(kernels.block).scratch(config, state)


def _bytes(tree: Any) -> int:
    """Bytes of a tree's tensors, each storage once."""
    storages = {
        x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tree_leaves(tree) if isinstance(x, Tensor)
    }
    return sum(storages.values())
