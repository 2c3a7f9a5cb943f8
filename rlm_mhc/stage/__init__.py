"""Functions with a backward of their own, and the ways to combine them: `Stage`."""

from rlm_mhc.stage.core import (
    Grads,
    Stage,
    Staged,
    Weights,
    bring_stage,
    chain,
    pullback,
    recompute,
    residual,
    stage,
    stage_of,
)
from rlm_mhc.stage.function import as_function

__all__ = [
    "Grads",
    "Stage",
    "Staged",
    "Weights",
    "as_function",
    "bring_stage",
    "chain",
    "pullback",
    "recompute",
    "residual",
    "stage",
    "stage_of",
]
