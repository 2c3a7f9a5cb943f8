"""Next-token cross-entropy."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.kernels import REFERENCE, Kernels
from rlm_mhc.fn.layout import require_entries, require_shape
from rlm_mhc.fn.lm import forward
from rlm_mhc.fn.norm import widen
from rlm_mhc.params import LMParams
from rlm_mhc.types import IGNORED_TARGET, Logits, Scalar, Tokens


class Batch(NamedTuple):
    """`tokens [*b, s]` and `targets [*b, s]`: `targets[t]` is the token after `tokens[t]`; -100 is not counted."""

    tokens: Tensor
    targets: Tensor


def loss(params: LMParams, batch: Batch, config: ModelConfig, kernels: Kernels = REFERENCE) -> Scalar:
    """Mean cross-entropy in nats over the counted targets; 0 where none is counted.

    Raises:
        ValueError: when there is no token, the targets have another shape, or a sequence is too long.

    >>> import torch; from rlm_mhc import fn
    >>> config = ModelConfig.preset("tiny")
    >>> batch = fn.Batch(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, -100]]))
    >>> grads, value = torch.func.grad_and_value(fn.loss)(fn.init(config), batch, config)
    >>> abs(value.item() - torch.tensor(4096.0).log().item()) < 0.5
    True
    """
    require_pairs(batch)
    logits = forward(params, batch.tokens, config, kernels)
    return token_loss_sum(logits, batch.targets) / count_targets(batch.targets).clamp(min=1)


def require_pairs(batch: Batch) -> None:
    """Check that tokens are int64 or int32, at least one, and targets int64 of the same shape.

    Raises:
        ValueError: naming tokens or targets, what they are and what is expected.
    """
    tokens, targets = batch
    require_entries("tokens", tokens)
    require_shape("tokens", tokens, tokens.device, tuple(tokens.shape), torch.int64, torch.int32)
    require_shape("targets", targets, tokens.device, tuple(tokens.shape), torch.int64)


def token_loss_sum(logits: Logits, targets: Tokens) -> Scalar:
    """The sum of the counted tokens' cross-entropies, in fp32 or wider.

    >>> import torch
    >>> token_loss_sum(torch.zeros(3, 8), torch.tensor([1, 2, -100]))
    tensor(4.1589)
    """
    flat = widen(logits).flatten(0, -2)
    return F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum")


def count_targets(targets: Tokens) -> Tensor:
    """How many targets count, a 0-d tensor."""
    return (targets != IGNORED_TARGET).sum()
