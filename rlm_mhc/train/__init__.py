"""The training run: its config, plan, loop, logs and pictures. Receives everything as arguments."""

from rlm_mhc.train.command import command
from rlm_mhc.train.curves import draw_curves
from rlm_mhc.train.device import pick_device
from rlm_mhc.train.loop import train
from rlm_mhc.train.output import open_output
from rlm_mhc.train.plan import make_plan
from rlm_mhc.train.run_config import DataConfig, RunConfig

__all__ = [
    "DataConfig",
    "RunConfig",
    "command",
    "draw_curves",
    "make_plan",
    "open_output",
    "pick_device",
    "train",
]
