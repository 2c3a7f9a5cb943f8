"""The mappings of a sub-layer and its normed input."""

from rlm_mhc.kernels.mix_pre.op import Mapped, Settings, Weights, mix_pre, mix_pre_backward

__all__ = ["Mapped", "Settings", "Weights", "mix_pre", "mix_pre_backward"]
