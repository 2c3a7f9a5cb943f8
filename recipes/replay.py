"""Repeat a step that a run stopped at: `python recipes/replay.py outputs/pretrain_1b/bad_steps/checkpoint-812`.

A run that stops after `training.max_bad_steps` steps without a finite loss and gradient leaves there the weights, the
optimizer and the batch of the last of them. This runs that step again, says where the numbers stop being finite, and
whether they are the ones recorded.
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path

from rlm_mhc.checkpoint import describe_run
from rlm_mhc.checkpoint.tensors import read_tensors
from rlm_mhc.config import TrainConfig
from rlm_mhc.fn import Batch
from rlm_mhc.program import make_train_step
from rlm_mhc.program.precision import LossScale, make_loss_scale
from rlm_mhc.train import pick_device
from rlm_mhc.train.command import fail
from rlm_mhc.train.diagnose import first_nonfinite
from rlm_mhc.train.kernels import pick_kernels
from rlm_mhc.train.output import CONFIG_FILE, read_config
from rlm_mhc.train.safe_stream import install_safe_streams
from rlm_mhc.train.save import BATCH_FILE
from rlm_mhc.train.start import load_state


def main(folder: Path, device_name: str) -> int:
    """Replay, print, and return 0 where the step came out as recorded."""
    device = pick_device(device_name)
    run = read_config(folder / CONFIG_FILE)
    if "bad_step" not in describe_run(folder):
        raise ValueError(f"{folder}: a checkpoint, but not of a step to replay; those are under bad_steps")
    state, saved, _, trainable = load_state(run, folder, device)
    recorded = {name: float(value) for name, value in saved["bad_step"].items()}
    batch = Batch(**read_tensors(folder / BATCH_FILE, device))
    training = _of_one_rank(run.training, saved["world"])
    scale: LossScale | tuple[()] = ()
    if "loss_scale" in recorded:
        scale = make_loss_scale(recorded["loss_scale"], 0, device)
    state = state._replace(step=state.step - 1, loss_scale=scale)
    kernels = pick_kernels(run.model, training, device)
    step = make_train_step(run.model, training, kernels=kernels, weight_source=trainable.weight_source)
    _, metrics = step(state, batch)
    replayed = {name: metrics[name].item() for name in recorded}

    print(f"step {saved['step']}, {len(batch.tokens)} sequences of {batch.tokens.shape[1]} tokens, {device}")
    print(_table(recorded, replayed))
    norms = [value for name, value in replayed.items() if name.startswith("grad_norm/")]
    print(first_nonfinite(trainable.model_of(state.params), batch, run.model, training, norms))
    same = all(_same(recorded[name], replayed[name]) for name in recorded)
    print("reproduced: every number is as recorded" if same else "not reproduced: numbers differ from those recorded")
    return 0 if same else 1


def _of_one_rank(training: TrainConfig, world: int) -> TrainConfig:
    """The training by one process of what several ranks did at once."""
    return dataclasses.replace(training, gradient_accumulation_steps=training.gradient_accumulation_steps * world)


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-4) or (math.isnan(a) and math.isnan(b))


def _table(recorded: dict[str, float], replayed: dict[str, float]) -> str:
    width = max(map(len, recorded))
    rows = [("", "recorded", "replayed")]
    rows += [(name, f"{recorded[name]:.6g}", f"{replayed[name]:.6g}") for name in recorded]
    return "\n".join(f"{name:<{width}}  {a:>12}  {b:>12}" for name, a, b in rows)


if __name__ == "__main__":
    install_safe_streams()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="OUTPUT_DIR/bad_steps/checkpoint-STEP")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    arguments = parser.parse_args()
    try:
        sys.exit(main(arguments.folder, arguments.device))
    except (ValueError, OSError) as error:
        fail(str(error), 2)
