"""The train step: a factory that closes over what is static and returns a function of state and batch."""

from rlm_mhc.program.state import TrainState, init_train_state
from rlm_mhc.program.step import make_train_step

__all__ = ["TrainState", "init_train_state", "make_train_step"]
