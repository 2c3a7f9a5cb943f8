"""The program of a step: embed, blocks, head, and back, with a layer's gradient reduced as soon as it is complete."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.kernels import Kernels
from rlm_mhc.fn.lm import positions, require_kind
from rlm_mhc.fn.loss import Batch
from rlm_mhc.fn.norm import widen
from rlm_mhc.params import LMParams
from rlm_mhc.program.functions import Announce, Functions, make_functions
from rlm_mhc.program.stage import Weights
from rlm_mhc.tree import named_leaves, size, unravel
from rlm_mhc.types import IGNORED_TARGET

# So many logits are alive at once: on a GPU enough for its products to be efficient, on a CPU few enough for its cache.
LOGITS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}
Reduce = Callable[[Tensor], Any]


class Gradients(NamedTuple):
    """`scale ×` the sum of token losses, its gradient, and `res` at sampled tokens, each `[tokens, n, n]`."""

    loss: Tensor
    grads: LMParams
    res: tuple[Tensor, ...]


def make_gradients(
    config: ModelConfig,
    kernels: Kernels,
    *,
    remat: str = "none",
    compiled: bool = False,
    announce: Announce | None = None,
) -> Callable[[LMParams, Sequence[Batch], Tensor, Reduce], Gradients]:
    """`gradients(params, microbatches, scale, reduce)`: of `scale · Σ token losses` by every parameter.

    The gradient of a layer is one flat vector, in fp32 or wider, summed over the microbatches. `reduce(vector)` is
    called on it while the layers before are still in backward, and on the rest at the end; it returns a vector, or a
    handle whose `wait()` does.
    """

    @cache
    def functions(shape: torch.Size) -> Functions:
        return make_functions(config, kernels, remat, compiled, announce)

    def gradients(params: LMParams, microbatches: Sequence[Batch], scale: Tensor, reduce: Reduce) -> Gradients:
        require_kind(params, config)
        run = functions(microbatches[0].tokens.shape)
        cos, sin = positions(microbatches[0].tokens, config)
        layers = [named_leaves(layer) | {"cos": cos, "sin": sin} for layer in params.layers]
        top = params._replace(layers=())
        top_sum = torch.zeros(size(top), dtype=widen(params.norm.weight[:0]).dtype, device=cos.device)
        into = unravel(top_sum, top)
        sums: list[Any] = [None] * len(layers)
        losses, res = [], []
        for number, batch in enumerate(microbatches):
            last = number == len(microbatches) - 1
            hidden, saved, sampled = _forward(run, params, layers, batch, remat, config)
            loss, cotangent = _head(run, params, into, hidden, batch.targets, scale)
            del hidden

            def add(index: int, flat: Tensor, last: bool = last) -> None:
                sums[index] = flat if sums[index] is None else sums[index].add_(flat)
                if last:
                    sums[index] = reduce(sums[index])

            _embed_backward(into, batch.tokens, _backward(run, layers, saved, cotangent, add), config)
            del saved, cotangent
            losses.append(loss)
            res.append(sampled)
        pending = [*sums, reduce(top_sum)]
        done = [vector.wait() if hasattr(vector, "wait") else vector for vector in pending]
        grads = unravel(done[-1], top)._replace(
            layers=tuple(unravel(flat, layer) for flat, layer in zip(done[:-1], params.layers, strict=True))
        )
        return Gradients(torch.stack(losses).sum(), grads, tuple(map(torch.cat, zip(*res, strict=True))))

    return gradients


class _Saved(NamedTuple):
    """`states`: the input of some layers, by number, the first among them; `kept`: what each layer kept."""

    states: dict[int, Tensor]
    kept: dict[int, Any]
    replay: Callable[[Tensor, Any], Tensor]


def _forward(
    run: Functions, params: LMParams, layers: Sequence[Weights], batch: Batch, remat: str, config: ModelConfig
) -> tuple[Tensor, _Saved, list[Tensor]]:
    period = stored_every(config) if remat == "mhc" else 1
    saved = _Saved({}, {}, run.replay)
    sampled: list[Tensor] = []
    hidden = run.embed(params.embed_tokens.weight, batch.tokens)
    for index, weights in enumerate(layers):
        if index % period == 0:
            saved.states[index] = hidden
        hidden, saved.kept[index], res = run.forward(weights, hidden)
        sampled += res
    return hidden, saved, sampled


def stored_every(config: ModelConfig) -> int:
    """With `remat="mhc"` the streams are stored every so many layers: `sqrt(n · layers / (n + 2))`.

    Source: arXiv 2512.24880, section 4.3.2.
    """
    n = config.mhc_flows
    return max(1, round(math.sqrt(n * config.num_layers / (n + 2))))


def _backward(
    run: Functions,
    layers: Sequence[Weights],
    saved: _Saved,
    cotangent: Tensor,
    add: Callable[[int, Tensor], None],
) -> Tensor:
    """The cotangent of the first layer's input; `add(index, flat gradient)` for each layer, from the last on."""
    for index in reversed(range(len(layers))):
        if index not in saved.states:
            start = max(i for i in saved.states if i < index)
            for i in range(start, index):
                saved.states[i + 1] = saved.replay(saved.states[i], saved.kept[i])
        flat, cotangent = run.backward(layers[index], saved.states.pop(index), saved.kept.pop(index), cotangent)
        add(index, flat)
    return cotangent


def _head(
    run: Functions, params: LMParams, into: LMParams, hidden: Tensor, targets: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss and the cotangent of `hidden`, chunk by chunk; the gradients of norm and matrix are added to `into`."""
    source, sink = (tree.lm_head if tree.lm_head else tree.embed_tokens for tree in (params, into))
    shape = hidden.shape
    hidden, targets = hidden.flatten(0, -2 - _stream_axes(params)), targets.flatten()
    size = chunk_tokens(len(targets), len(source.weight), hidden.device)
    losses, cotangents = [], []
    for rows, wanted in zip(hidden.split(size), targets.split(size), strict=True):
        missing = size - len(wanted)
        if missing:  # one shape for all chunks: the last one is filled with tokens that do not count
            rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
            wanted = F.pad(wanted, (0, missing), value=IGNORED_TARGET)
        loss, g_norm, g_matrix, g_rows = run.head(params.norm.weight, source.weight, rows, wanted, scale)
        into.norm.weight.add_(g_norm)
        sink.weight.add_(g_matrix)
        losses.append(loss)
        cotangents.append(g_rows[: size - missing])
    return torch.stack(losses).sum(), torch.cat(cotangents).view(shape)


def chunk_tokens(tokens: int, vocab_size: int, device: torch.device) -> int:
    """Tokens per chunk of the head: equal chunks of about `LOGITS_AT_ONCE` logits."""
    chunks = math.ceil(tokens * vocab_size / LOGITS_AT_ONCE[device.type])
    return math.ceil(tokens / min(chunks, tokens))


def _stream_axes(params: LMParams) -> int:
    return 1 if params.layers[0].attn_mhc else 0


def _embed_backward(into: LMParams, tokens: Tensor, cotangent: Tensor, config: ModelConfig) -> None:
    rows = cotangent.sum(-2) if config.mhc_enabled else cotangent
    vocab_size = len(into.embed_tokens.weight)
    # PyTorch's own kernel sums in a fixed order; compiled, it would become additions in the order of the threads.
    into.embed_tokens.weight.add_(torch.ops.aten.embedding_dense_backward(rows, tokens, vocab_size, -1, False))
