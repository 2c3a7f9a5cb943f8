"""Next-token cross-entropy."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.kernels import REFERENCE, Kernels
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

    >>> import torch; from rlm_mhc import fn
    >>> config = ModelConfig.preset("tiny")
    >>> batch = fn.Batch(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, -100]]))
    >>> grads, value = torch.func.grad_and_value(fn.loss)(fn.init(config), batch, config)
    >>> abs(value.item() - torch.tensor(4096.0).log().item()) < 0.5
    True
    """
    logits = forward(params, batch.tokens, config, kernels)
    return token_loss_sum(logits, batch.targets) / count_targets(batch.targets).clamp(min=1)


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
