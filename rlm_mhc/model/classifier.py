"""A classifier on the backbone, as reward models are."""

from transformers.modeling_layers import GenericForSequenceClassification

from rlm_mhc.config import ModelConfig
from rlm_mhc.model.config import RLMConfig, as_rlm_config
from rlm_mhc.model.pretrained import HEADS, RLMPreTrainedModel


class RLMForSequenceClassification(GenericForSequenceClassification, RLMPreTrainedModel):
    """The backbone with a linear map of the last token's state to `num_labels` scores
    (`AutoModelForSequenceClassification`).

    It loads the folder of a language model, whose head it ignores; its own, `score.weight`, is then initialised.

    Args:
        config: an `RLMConfig` or a `ModelConfig`.

    >>> import torch
    >>> model = RLMForSequenceClassification(RLMConfig(hidden_dim=64, num_heads=2, num_layers=1, num_labels=1))
    >>> model(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 1])
    """

    optional_weights = HEADS

    def __init__(self, config: RLMConfig | ModelConfig) -> None:
        super().__init__(as_rlm_config(config))
