"""Where a run starts: fresh weights at the first sequence, or where a checkpoint left off."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlm_mhc.checkpoint import load_run
from rlm_mhc.config import ModelConfig
from rlm_mhc.data import Position, Prepared
from rlm_mhc.fn import adamw_init
from rlm_mhc.program import TrainState, init_train_state
from rlm_mhc.program.precision import LossScale, init_loss_scale
from rlm_mhc.program.state import resume_train_state
from rlm_mhc.train.run_config import RunConfig


class Start(NamedTuple):
    """State, position of the next sequence, and tokens seen so far."""

    state: TrainState
    position: Position
    tokens: int


def starting_point(run: RunConfig, checkpoint: Path | None, data: Prepared, device: torch.device) -> Start:
    """A fresh start, or all of a checkpoint: weights, optimizer, step, and where the data are the same, the position.

    Raises:
        FileNotFoundError: when a file of the checkpoint is missing.
        ValueError: when one is damaged, or of a model of another shape.
    """
    if checkpoint is None:
        return Start(init_train_state(run.model, run.training, seed=run.seed, device=device), Position(run.seed), 0)
    saved = load_run(checkpoint, adamw_init, device)
    if saved.config != run.model:
        raise ValueError(f"{checkpoint}: a model of another shape: {_differences(saved.config, run.model)}")
    state = resume_train_state(
        saved.params, saved.optimizer, saved.trainer_state["step"], _loss_scale(run, saved.trainer_state, device)
    )
    position = Position(run.seed)
    if saved.trainer_state.get("data") == data.fingerprint:
        position = Position(**saved.trainer_state["position"])
    else:
        print("             the data are others than the checkpoint's: they start at their beginning", flush=True)
    print(f"resumed      {checkpoint}, step {int(state.step)}", flush=True)
    return Start(state, position, saved.trainer_state.get("tokens", 0))


def _loss_scale(run: RunConfig, saved: dict[str, Any], device: torch.device) -> LossScale | tuple[()]:
    fresh = init_loss_scale(run.training.mixed_precision, device)
    if not fresh or "loss_scale" not in saved:
        return fresh
    return LossScale(*(torch.tensor(saved["loss_scale"][name], device=device) for name in LossScale._fields))


def _differences(theirs: ModelConfig, ours: ModelConfig) -> str:
    pairs = [(f.name, getattr(theirs, f.name), getattr(ours, f.name)) for f in dataclasses.fields(ModelConfig)]
    return ", ".join(f"it has {name}={a}, model.{name} is {b}" for name, a, b in pairs if a != b)
