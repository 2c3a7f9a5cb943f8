"""The combine of one sub-layer and the mappings of the next."""

from rlm_mhc.kernels.mix_post_pre.function import mix_post_pre
from rlm_mhc.kernels.mix_post_pre.op import mix_post_pre_backward

__all__ = ["mix_post_pre", "mix_post_pre_backward"]
