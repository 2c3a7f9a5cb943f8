"""Head and loss in chunks of tokens: loss and gradient of a chunk in one go, so that few logits exist at once."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlm_mhc.params import LMParams
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
    head: Callable[..., Any], params: LMParams, into: LMParams, hidden: Tensor, targets: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """`scale ·` the sum of the losses, and the cotangent of `hidden`; other gradients are added to the tree `into`.

    The cotangent of a sum is known before the loss is, so that a chunk's backward follows its forward at once.

    Args:
        head: of `Functions`.
        params: the model's.
        into: gradients of what is not a layer.
        hidden: `[b, s, …]`.
        targets: `[b, s]`.
        scale: 0-d.
    """
    source, sink = (tree.lm_head if tree.lm_head else tree.embed_tokens for tree in (params, into))
    rows_of, wanted_of = hidden.flatten(0, 1), targets.flatten()
    size = chunk_tokens(len(wanted_of), len(source.weight), hidden.device.type)
    losses, cotangents = [], []
    for rows, wanted in zip(rows_of.split(size), wanted_of.split(size), strict=True):
        missing = size - len(wanted)
        if missing:  # one shape for all chunks: the last one is filled with tokens that do not count
            rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
            wanted = F.pad(wanted, (0, missing), value=IGNORED_TARGET)
        loss, g_norm, g_matrix, g_rows = head(params.norm.weight, source.weight, rows, wanted, scale)
        into.norm.weight.add_(g_norm)
        sink.weight.add_(g_matrix)
        losses.append(loss)
        cotangents.append(g_rows[: size - missing])
        del g_norm, g_matrix, g_rows  # before the next chunk's are made
    whole = cotangents[0] if len(cotangents) == 1 else torch.cat(cotangents)
    return torch.stack(losses).sum(), whole.view(hidden.shape)
