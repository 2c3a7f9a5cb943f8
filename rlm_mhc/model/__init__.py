"""The Hugging Face face: the model as transformers, peft, accelerate and lm-eval take any other.

Importing it registers `RLMConfig` and `RLMModel` with transformers' `Auto` classes.
"""

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlm_mhc.model.config import RLMConfig
from rlm_mhc.model.lm import RLMModel
from rlm_mhc.model.mhc import mHCLayer

AutoConfig.register(RLMConfig.model_type, RLMConfig, exist_ok=True)
AutoModelForCausalLM.register(RLMConfig, RLMModel, exist_ok=True)
# By this table Trainer knows whose labels are to be shifted when it smooths them.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[RLMConfig.model_type] = RLMModel.__name__

__all__ = ["RLMConfig", "RLMModel", "mHCLayer"]
