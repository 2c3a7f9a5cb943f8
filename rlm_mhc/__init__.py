"""Language models with manifold-constrained hyper-connections (mHC), as pure functions over explicit trees.

- `rlm_mhc.fn`: the mathematics; `ModelConfig`, `TrainConfig`: what to build and how to train it
- `rlm_mhc.program`: the train step
- `load_pretrained`, `save_pretrained`: weights on disk as safetensors
"""

from rlm_mhc import fn
from rlm_mhc.checkpoint.weights import load_pretrained, save_pretrained
from rlm_mhc.config import ModelConfig, TrainConfig

__version__ = "0.1.0"

__all__ = ["ModelConfig", "TrainConfig", "fn", "load_pretrained", "save_pretrained"]
