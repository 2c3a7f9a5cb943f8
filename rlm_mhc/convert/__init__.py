"""Weights of other libraries as ours, and ours as theirs.

- `from_llama`, `upcycle`: Llama, Mistral, Qwen2, Qwen3 (a module, a folder, a GGUF file) as an mHC model of the same
  logits, in memory or on disk
- `to_llama`: a model whose hyper-connections do nothing as one of them
- `mhc_from_deepseek_v4`: the hyper-connections of DeepSeek-V4
"""

from rlm_mhc.convert.deepseek_v4 import mhc_from_deepseek_v4
from rlm_mhc.convert.export import to_llama
from rlm_mhc.convert.llama import from_llama, upcycle

__all__ = ["from_llama", "mhc_from_deepseek_v4", "to_llama", "upcycle"]
