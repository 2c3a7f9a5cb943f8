"""Everything that changes from update to update, as one tree."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlm_mhc.config import ModelConfig, TrainConfig
from rlm_mhc.fn.optim import AdamWState, adamw_init
from rlm_mhc.params import init
from rlm_mhc.program.precision import LossScale, init_loss_scale
from rlm_mhc.tree import tree_leaves


class TrainState(NamedTuple):
    """`params`: what is trained, in fp32, as a rule all of the model; the optimizer's moments; `step`: the number of
    steps done, skipped ones included, a 0-d int64 tensor; and for fp16 the scale of the loss."""

    params: Any
    optimizer: AdamWState
    step: Tensor
    loss_scale: LossScale | tuple[()] = ()


def init_train_state(
    config: ModelConfig, train_config: TrainConfig, *, seed: int = 0, device: torch.device | str | None = None
) -> TrainState:
    """Fresh parameters, zero moments, step 0.

    Args:
        config: the model.
        train_config: its training.
        seed: of the initial weights.
        device: None is the CUDA device where there is one, else the CPU.

    >>> state = init_train_state(ModelConfig.preset("tiny"), TrainConfig(), device="cpu")
    >>> state.step
    tensor(0)
    """
    device = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    params = init(config, seed=seed, device=device)
    return resume_train_state(params, adamw_init(params), 0, init_loss_scale(train_config.mixed_precision, device))


def resume_train_state(params: Any, optimizer: Any, step: int, loss_scale: LossScale | tuple[()] = ()) -> TrainState:
    """The state after `step` updates, from its parts."""
    count = torch.tensor(step, dtype=torch.int64, device=tree_leaves(params)[0].device)
    return TrainState(params, optimizer, count, loss_scale)
