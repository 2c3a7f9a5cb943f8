"""The mixing of the preset `single_pass`, where `pre` comes from the sub-layer before."""

from rlm_mhc.kernels.single_pass.op import single_pass_post_pre, single_pass_pre, single_pass_pre_backward

__all__ = ["single_pass_post_pre", "single_pass_pre", "single_pass_pre_backward"]
