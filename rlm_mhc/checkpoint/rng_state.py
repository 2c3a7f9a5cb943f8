"""The states of the random generators of this process, as values that a checkpoint can hold."""

import random
from typing import Any

import numpy as np
import torch


def rng_states() -> dict[str, Any]:
    """Those of Python, numpy, torch and, where there is one, this process's CUDA device."""
    kind, key, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(key).tolist(), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def seed_generators(seed: int) -> None:
    """Start all generators of this process from one seed."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed % (1 << 63))


def restore_rng_states(states: dict[str, Any]) -> None:
    """Put all generators where `rng_states` found them.

    >>> states = rng_states()
    >>> first = torch.rand(()), random.random(), np.random.rand()
    >>> restore_rng_states(states)
    >>> first == (torch.rand(()), random.random(), np.random.rand())
    True
    """
    random.setstate(states["python"])
    kind, key, *rest = states["numpy"]
    np.random.set_state((kind, np.array(key, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
