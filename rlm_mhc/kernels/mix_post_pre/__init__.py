"""The combine of one sub-layer and the mappings of the next."""

from rlm_mhc.kernels.mix_post_pre.op import mix_post_pre

__all__ = ["mix_post_pre"]
