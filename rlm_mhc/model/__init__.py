"""The Hugging Face face: the model as transformers, peft, accelerate and lm-eval take any other.

Importing it registers `RLMConfig` and `RLMModel` with transformers' `Auto` classes.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from rlm_mhc.model.config import RLMConfig
from rlm_mhc.model.lm import RLMModel
from rlm_mhc.model.mhc import mHCLayer

AutoConfig.register(RLMConfig.model_type, RLMConfig, exist_ok=True)
AutoModelForCausalLM.register(RLMConfig, RLMModel, exist_ok=True)

__all__ = ["RLMConfig", "RLMModel", "mHCLayer"]
