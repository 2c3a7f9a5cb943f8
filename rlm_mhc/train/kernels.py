"""The kernels that a run names."""

import torch

from rlm_mhc.config import ModelConfig, TrainConfig
from rlm_mhc.fn import REFERENCE, Kernels


def pick_kernels(model: ModelConfig, training: TrainConfig, device: torch.device) -> Kernels:
    """The reference, with attention by the library that `training.attention` names.

    Raises:
        ValueError: when that library is not installed, or does not run this model on this device in this precision.
    """
    if training.attention == "torch":
        return REFERENCE
    if device.type != "cuda" or training.mixed_precision == "fp32":
        raise ValueError(
            "training.attention='flash_attn' runs on CUDA in bf16 or fp16 only; use training.attention=torch"
        )
    from rlm_mhc.kernels.flash_attention import flash_attention, require_flash_attention

    require_flash_attention(model.head_width)
    return REFERENCE._replace(attention=flash_attention)
