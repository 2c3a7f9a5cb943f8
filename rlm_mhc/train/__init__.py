"""The training run: its config, plan, loop, logs and pictures. Receives everything as arguments."""

from rlm_mhc.train.command import command
from rlm_mhc.train.curves import draw_curves
from rlm_mhc.train.device import pick_device
from rlm_mhc.train.finetune_config import FinetuneConfig, FinetuneData, with_model
from rlm_mhc.train.loop import train
from rlm_mhc.train.output import open_output
from rlm_mhc.train.plan import make_plan
from rlm_mhc.train.run_config import DataConfig, RunConfig
from rlm_mhc.train.session import distributed_session, print_plan, run_training
from rlm_mhc.train.start import initial_state

__all__ = [
    "DataConfig",
    "FinetuneConfig",
    "FinetuneData",
    "RunConfig",
    "command",
    "distributed_session",
    "draw_curves",
    "initial_state",
    "make_plan",
    "open_output",
    "pick_device",
    "print_plan",
    "run_training",
    "train",
    "with_model",
]
