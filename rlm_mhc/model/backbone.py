"""The language model without its head: modules own the weights under their dotted names, `fn` computes."""

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple

from rlm_mhc import fn
from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.layout import require_entries
from rlm_mhc.model.block import Block, Head, Norm, embedding_tree, norm_tree, tree_of
from rlm_mhc.model.config import RLMConfig
from rlm_mhc.model.kernels import kernels_for
from rlm_mhc.model.pretrained import HEADS, RLMPreTrainedModel
from rlm_mhc.params import LMParams, weight_table

# transformers renamed it in 5.24.
CACHE = "cache" if "cache" in {f.name for f in dataclasses.fields(BaseModelOutputWithPast)} else "past_key_values"


class RLMBackbone(RLMPreTrainedModel):
    """A language model with manifold-constrained hyper-connections up to its last norm (`AutoModel`).

    Args:
        config: an `RLMConfig` or a `ModelConfig`.

    >>> model = RLMBackbone(ModelConfig.preset("tiny"))
    >>> model(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
    torch.Size([1, 3, 128])
    """

    optional_weights = HEADS
    _checkpoint_conversion_mapping: dict[str, str] = {}  # noqa: RUF012
    layers: Any

    def __init__(self, config: RLMConfig | ModelConfig) -> None:
        super().__init__(config)
        self.shape = shape = self.config.model_config
        table = weight_table(shape)
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_dim)
        self.layers = nn.ModuleList(Block(shape, index, self.config) for index in range(shape.num_layers))
        self.norm = Norm(shape.hidden_dim, shape.norm_eps)
        if table.head_mhc:
            self.head_mhc = Head(table.head_mhc, shape)
        self.gradient_checkpointing = False
        self.post_init()

    def tree(self) -> LMParams:
        """Return the weights as `fn.backbone` takes them, the parameters themselves; where an adapter or a quantised
        layer replaces one, that module. `lm_head` is `()`."""
        return self._outer()._replace(layers=tuple(layer.tree() for layer in self.used_layers()))

    def used_layers(self) -> list[Block]:
        """Return the layers of a forward; `assistant_early_exit` lowers their number in the config for a while."""
        return list(self.layers)[: self.config.num_hidden_layers]

    def _outer(self) -> LMParams:
        """Return the weights outside the layers."""
        head_mhc = tree_of(self.head_mhc, Head) if hasattr(self, "head_mhc") else ()
        return LMParams(embedding_tree(self.embed_tokens), (), norm_tree(self.norm), (), head_mhc)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Return `last_hidden_state [b, s, c]`, the state after the last norm: `lm_head` of it are the logits.

        Args:
            input_ids: tokens `[b, s]`.
            attention_mask: `[b, s]`, with a cache `[b, seen + s]`: 0 at padding; or what the attention takes.
            position_ids: `[b, s]`; None: counted from the length of the cache.
            cache: transformers' keys and values of the tokens before these; extended in place.
            past_key_values: another name of `cache`.
            inputs_embeds: `[b, s, c]` in place of `input_ids`.
            use_cache: None: as the config says, and never in training.
            output_hidden_states: also return `hidden_states`: the collapsed streams `[b, s, c]` that enter each layer,
                and `last_hidden_state`. None: as the config says.
            output_attentions: also return the attention weights of each layer, where `attn_implementation` computes
                them (`eager`). None: as the config says.
            **options: for the attention function; `return_dict=False` returns a tuple.

        Raises:
            ValueError: on both or neither of `input_ids` and `inputs_embeds`, no token, or more than `max_seq_len`.
        """
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            # Replicas of nn.DataParallel cannot hand caches back.
            use_cache = self.config.use_cache and not self.training and not getattr(self, "_is_replica", False)
        outer = self._outer()
        x = self._embed(outer, input_ids, inputs_embeds)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        seen = cache.get_seq_length() if cache is not None and position_ids is None else 0
        self._require_fit(seen, x.shape[1], position_ids)
        if position_ids is None:
            position_ids = (torch.arange(x.shape[1], dtype=torch.int64, device=x.device) + seen).unsqueeze(0)
        given = {CACHE: cache, "position_ids": position_ids}
        mask = create_causal_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask, **given)
        cos, sin = fn.rotary_table(position_ids, self.shape.head_width, self.shape.rope_theta)
        with_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        with_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        hidden, states, attentions = fn.expand(x, self.shape), [x], []
        kernels = kernels_for(self.config.kernels, self.shape, x.device, x.dtype)
        for layer in self.used_layers():
            streams, pre, weights = layer(*hidden, cos, sin, mask=mask, cache=cache, kernels=kernels, **options)
            hidden = fn.Hidden(streams, pre)
            attentions.append(weights)
            if with_states:
                states.append(fn.collapse(outer, hidden, self.shape))
        normalise = partial(kernels.rms_norm, eps=self.shape.norm_eps)
        last = fn.norm(outer.norm, fn.collapse(outer, hidden, self.shape), normalise)
        return BaseModelOutputWithPast(
            last_hidden_state=last,
            hidden_states=(*states[:-1], last) if with_states else None,
            attentions=tuple(w for w in attentions if w is not None) if with_attentions else None,
            **{CACHE: cache if use_cache else None},
        )

    def _embed(self, outer: LMParams, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if input_ids is not None and inputs_embeds is None:
            x = fn.embedding(outer.embed_tokens, input_ids)
        elif inputs_embeds is not None and input_ids is None:
            x = inputs_embeds
        else:
            raise ValueError("give either input_ids or inputs_embeds")
        require_entries("tokens" if input_ids is not None else "inputs_embeds", x[..., 0])
        return x

    def _require_fit(self, seen: Any, count: int, position_ids: Tensor | None) -> None:
        """Compare the last position with `max_seq_len`. A row of packed documents may be longer: its positions are
        not. In a compiled graph, which grows no cache, the length of the cache is a tensor and is not compared; nor
        are positions on another device, for which each step would wait, unless the tokens alone are too many."""
        limit = self.config.max_position_embeddings
        total = count + seen if isinstance(seen, int) else count
        if position_ids is not None and not torch.compiler.is_compiling() and (position_ids.is_cpu or total > limit):
            total = int(position_ids.max()) + 1
        elif position_ids is not None:
            return
        if total > limit:
            raise ValueError(f"sequence of {total} tokens: longer than max_seq_len={limit} of the model")
