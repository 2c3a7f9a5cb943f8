"""Weights, optimizer and run state on disk."""

from rlm_mhc.checkpoint.run import checkpoints, load_run, save_run
from rlm_mhc.checkpoint.weights import load_pretrained, save_pretrained

__all__ = ["checkpoints", "load_pretrained", "load_run", "save_pretrained", "save_run"]
