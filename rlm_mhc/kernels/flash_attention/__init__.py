"""Causal attention by the flash-attn package."""

from rlm_mhc.kernels.flash_attention.op import flash_attention, require_flash_attention

__all__ = ["flash_attention", "require_flash_attention"]
