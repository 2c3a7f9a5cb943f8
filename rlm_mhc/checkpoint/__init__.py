"""Weights, optimizer and run state on disk."""

from rlm_mhc.checkpoint.config_files import load_config
from rlm_mhc.checkpoint.rng_state import restore_rng_states, rng_states, seed_generators
from rlm_mhc.checkpoint.run import (
    checkpoints,
    describe_run,
    is_run,
    load_run,
    newest_whole,
    recover,
    save_run,
    set_aside,
    verify_run,
)
from rlm_mhc.checkpoint.weights import load_pretrained, save_pretrained
from rlm_mhc.checkpoint.writer import Writer, snapshot

__all__ = [
    "Writer",
    "checkpoints",
    "describe_run",
    "is_run",
    "load_config",
    "load_pretrained",
    "load_run",
    "newest_whole",
    "recover",
    "restore_rng_states",
    "rng_states",
    "save_pretrained",
    "save_run",
    "seed_generators",
    "set_aside",
    "snapshot",
    "verify_run",
]
