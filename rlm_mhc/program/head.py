"""Head and loss in chunks of tokens: loss and gradient of a chunk in one go, so that few logits exist at once."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlm_mhc.params import LMParams
from rlm_mhc.tree import rebuild, tree_leaves, tree_map
from rlm_mhc.types import IGNORED_TARGET

# So many logits are alive at once: on a GPU enough for its products to be efficient, on a CPU few enough for its cache.
LOGITS_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 26}


def chunk_tokens(tokens: int, vocab_size: int, device: str) -> int:
    """Tokens per chunk: equal chunks of at most about `LOGITS_AT_ONCE` logits.

    >>> chunk_tokens(1000, 1 << 14, "cpu")
    250
    """
    chunks = math.ceil(tokens * vocab_size / LOGITS_AT_ONCE[device])
    return math.ceil(tokens / min(chunks, tokens))


def run_head(
    head: Callable[..., Any], params: LMParams, into: Any, hidden: Any, targets: Tensor, scale: Tensor
) -> tuple[Tensor, Any]:
    """`scale ·` the sum of the losses, and the cotangent of `hidden`; other gradients are added to the tree `into`.

    The cotangent of a sum is known before the loss is, so that a chunk's backward follows its forward at once.

    Args:
        head: of `Functions`.
        params: the model's.
        into: gradients of what is not a layer: an `LMParams`, or where less is trained a tree with `head_mhc` alone.
        hidden: tensors `[b, s, …]`.
        targets: `[b, s]`.
        scale: 0-d.
    """
    top, sinks = top_weights(params), top_weights(into)
    losses, cotangents = [], []
    for rows, wanted, count in equal_chunks(hidden, targets, len(top[1])):
        loss, grads, g_rows = head(top, rows, wanted, scale)
        for sink, grad in zip(sinks, grads, strict=True):
            sink.add_(grad)
        losses.append(loss)
        cotangents.append(tree_map(lambda g: g[:count], g_rows))  # noqa: B023
        del grads, g_rows  # before the next chunk's are made
    whole = cotangents[0] if len(cotangents) == 1 else tree_map(lambda *parts: torch.cat(parts), *cotangents)
    return torch.stack(losses).sum(), tree_map(lambda g, x: g.view(x.shape), whole, hidden)


def equal_chunks(hidden: Any, targets: Tensor, vocab_size: int) -> Iterator[tuple[Any, Tensor, int]]:
    """Yield `(rows, targets, count)`, chunks of one shape: the last one is filled with tokens whose targets are ignored
    to more than its `count`."""
    flat = targets.flatten()
    size = chunk_tokens(len(flat), vocab_size, targets.device.type)
    for rows, wanted in zip(chunks(hidden, size), flat.split(size), strict=True):
        count = len(wanted)
        missing = size - count
        if missing:
            rows = tree_map(lambda x: torch.cat([x, x.new_zeros(missing, *x.shape[1:])]), rows)  # noqa: B023
            wanted = F.pad(wanted, (0, missing), value=IGNORED_TARGET)
        yield rows, wanted, count


def top_weights(tree: Any) -> tuple[Tensor, ...]:
    """Return `(norm, matrix, *head_mhc)` of an `LMParams`, or `head_mhc` where less is trained."""
    if not isinstance(tree, LMParams):
        return tuple(tree.head_mhc)
    return (tree.norm.weight, (tree.lm_head or tree.embed_tokens).weight, *tree.head_mhc)


def chunks(hidden: Any, size: int) -> list[Any]:
    """A tree of tensors `[b, s, …]` in pieces of at most `size` tokens, each a tree of `[tokens, …]`."""
    pieces = zip(*(x.flatten(0, 1).split(size) for x in tree_leaves(hidden)), strict=True)
    return [rebuild(hidden, iter(piece)) for piece in pieces]
