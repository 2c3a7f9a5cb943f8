"""The causal language model: the backbone and the projection onto the vocabulary."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from rlm_mhc import fn
from rlm_mhc.config import ModelConfig
from rlm_mhc.model.backbone import CACHE, RLMBackbone
from rlm_mhc.model.block import linear_tree
from rlm_mhc.model.config import RLMConfig
from rlm_mhc.model.generation import BoundedGeneration
from rlm_mhc.model.pretrained import HEADS, RLMPreTrainedModel
from rlm_mhc.params import Embedding, Linear, LMParams


class RLMModel(BoundedGeneration, RLMPreTrainedModel, GenerationMixin):
    """A language model with manifold-constrained hyper-connections, as transformers knows models
    (`AutoModelForCausalLM`).

    `tree()` gives its weights to the functions of `rlm_mhc.fn`, and its logits are those of `fn.forward`, bit for bit.
    Initial weights are those of `fn.init` with the seed that `torch.manual_seed` was given. mHC weights stay in fp32
    with any `dtype`.

    Args:
        config: an `RLMConfig` or a `ModelConfig`.

    >>> model = RLMModel(ModelConfig.preset("tiny")).eval()
    >>> tokens = torch.tensor([[1, 2, 3]])
    >>> torch.equal(model(tokens).logits, fn.forward(model.tree(), tokens, model.config.model_config))
    True
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    optional_weights = HEADS - {"lm_head.weight"}

    def __init__(self, config: RLMConfig | ModelConfig) -> None:
        super().__init__(config)
        self.model = RLMBackbone(self.config)
        self.lm_head = nn.Linear(self.model.shape.hidden_dim, self.model.shape.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"
        self.post_init()

    def tree(self) -> LMParams:
        """Return the weights as `fn` takes them, the parameters themselves; where an adapter or a quantised layer
        replaces one, that module. `lm_head` is `()` while its weight is the embedding's."""
        return self.model.tree()._replace(lm_head=() if self._is_tied() else linear_tree(self.lm_head))

    def _is_tied(self) -> bool:
        head = linear_tree(self.lm_head)
        return isinstance(head, Linear) and head.weight is getattr(self.model.embed_tokens, "weight", None)

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any) -> None:
        """Save as transformers does, with `tie_embeddings` set from the current head, since peft merges a trained head
        into a tied model, and a checksum per weight in the files' metadata."""
        if isinstance(linear_tree(self.lm_head), Linear) and isinstance(self.model.tree().embed_tokens, Embedding):
            self.config.tie_embeddings = self._is_tied()
        super().save_pretrained(save_directory, is_main_process, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return logits `[b, s, v]`, and with `labels` the mean cross-entropy of each label given the tokens before it.

        Args:
            input_ids: this and all arguments not listed are those of `RLMBackbone.forward`.
            labels: `[b, s]`, the tokens themselves, which are shifted here; -100 is not counted.
            logits_to_keep: so many of the last positions get logits, 0 for all; or their indices.
            **options: for the backbone and the loss.

        Raises:
            ValueError: as the backbone does.
        """
        output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **options,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = fn.linear(linear_tree(self.lm_head), output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **options)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            **{CACHE: getattr(output, CACHE)},
        )

    @torch.no_grad()
    def get_mhc_metrics(self, input_ids: Tensor | None = None) -> list[tuple[float, float]]:
        """Return the largest entry of `res` at each layer's attention and MLP, over the tokens of `input_ids [b, s]`.

        Without tokens, of the part that does not depend on the input. Without mHC the residual is the identity: 1, 1.
        """
        config, layers = self.config.model_config, self.model.used_layers()
        if not config.mhc_enabled:
            return [(1.0, 1.0)] * len(layers)
        if input_ids is None:
            sites = [site.get_connection_matrix() for layer in layers for site in (layer.attn_mhc, layer.mlp_mhc)]
        else:
            # The weights also of hooked modules: a module in their place returns no `res`.
            weights = tuple(
                layer.tree()._replace(attn_mhc=layer.attn_mhc.tree(), mlp_mhc=layer.mlp_mhc.tree()) for layer in layers
            )
            sites = list(fn.backbone(self.model.tree()._replace(layers=weights), input_ids, config).res)
        largest = torch.stack([res.abs().max() for res in sites]).tolist()
        return list(zip(largest[::2], largest[1::2], strict=True))
