"""The combine of a sub-layer."""

from rlm_mhc.kernels.mix_post.op import mix_post, mix_post_backward, mix_post_reduce

__all__ = ["mix_post", "mix_post_backward", "mix_post_reduce"]
