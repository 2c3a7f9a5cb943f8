"""The train step and the decoder: factories that close over what is static and return functions of what changes."""

from rlm_mhc.program.decode import make_decoder
from rlm_mhc.program.state import TrainState, init_train_state
from rlm_mhc.program.step import Program, make_program, make_train_step

__all__ = ["Program", "TrainState", "init_train_state", "make_decoder", "make_program", "make_train_step"]
