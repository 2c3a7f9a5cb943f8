"""Weights of other libraries as ours."""

from rlm_mhc.convert.deepseek_v4 import mhc_from_deepseek_v4

__all__ = ["mhc_from_deepseek_v4"]
