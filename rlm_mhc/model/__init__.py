"""The Hugging Face face: the models as transformers, peft, accelerate, trl and lm-eval take any other.

Importing it registers `RLMConfig` and the three models with transformers' `Auto` classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto import modeling_auto

from rlm_mhc.model.backbone import RLMBackbone
from rlm_mhc.model.classifier import RLMForSequenceClassification
from rlm_mhc.model.config import RLMConfig
from rlm_mhc.model.lm import RLMModel
from rlm_mhc.model.mhc import mHCLayer
from rlm_mhc.model.pretrained import FROM_DISK

AutoConfig.register(RLMConfig.model_type, RLMConfig, exist_ok=True)
# By these tables Trainer knows whose labels are to be shifted when it smooths them.
for auto, names, model in (
    (AutoModel, modeling_auto.MODEL_MAPPING_NAMES, RLMBackbone),
    (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, RLMModel),
    (
        AutoModelForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        RLMForSequenceClassification,
    ),
):
    auto.register(RLMConfig, model, exist_ok=True)
    names[RLMConfig.model_type] = model.__name__
register_checkpoint_conversion_mapping(
    RLMConfig.model_type, [WeightRenaming(*names) for names in FROM_DISK.items()], overwrite=True
)

__all__ = ["RLMBackbone", "RLMConfig", "RLMForSequenceClassification", "RLMModel", "mHCLayer"]
