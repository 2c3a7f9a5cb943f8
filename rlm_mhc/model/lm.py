"""The language model as a `PreTrainedModel`: modules own the weights under their dotted names, `fn` computes."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from rlm_mhc import fn
from rlm_mhc.checkpoint.config_files import CONFIG_FILE, GENERATION_FILE
from rlm_mhc.checkpoint.tensors import add_checksums
from rlm_mhc.checkpoint.weights import few, load_pretrained, weight_files
from rlm_mhc.config import ModelConfig
from rlm_mhc.model.block import Block, Head, Norm, embedding_tree, linear_tree, norm_tree, tree_of
from rlm_mhc.model.config import RLMConfig
from rlm_mhc.params import INIT_STD, Linear, LMParams, weight_table
from rlm_mhc.tree import named_leaves, tree_map

# transformers renamed it in 5.24.
CACHE = "cache" if "cache" in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"


class RLMModel(PreTrainedModel, GenerationMixin):
    """A language model with manifold-constrained hyper-connections, as transformers knows models.

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

    config_class = RLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = True
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012
    layers: Any

    def __init__(self, config: RLMConfig | ModelConfig) -> None:
        if isinstance(config, ModelConfig):
            config = RLMConfig(**dataclasses.asdict(config))
        super().__init__(config)
        self.shape = shape = config.model_config
        table = weight_table(shape)
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_dim)
        self.layers = nn.ModuleList(Block(shape, index, config) for index in range(shape.num_layers))
        self.norm = Norm(shape.hidden_dim, shape.norm_eps)
        self.lm_head = nn.Linear(shape.hidden_dim, shape.vocab_size, bias=False)
        if table.head_mhc:
            self.head_mhc = Head(table.head_mhc, shape)
        self.gradient_checkpointing = False
        self.loss_type = "ForCausalLM"
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        prefix = next((name for name, other in self.named_modules() if other is module), "")
        specs = named_leaves(weight_table(self.shape))
        for name, parameter in module.named_parameters(recurse=False):
            spec = specs.get(f"{prefix}.{name}")
            if spec is not None and not parameter.is_meta:
                initial = spec.init(f"{prefix}.{name}", torch.initial_seed(), parameter.device, parameter.dtype)
                init.copy_(parameter, initial)
            elif isinstance(module, (nn.Linear, nn.Embedding)) and name == "weight":
                init.normal_(parameter, std=INIT_STD)  # of another size, made to take the place of one of these

    def tree(self) -> LMParams:
        """The weights as `fn` takes them: the parameters themselves; where an adapter or a quantised layer stands in
        for one, that module."""
        layers = tuple(layer.tree() for layer in self.layers)
        head = linear_tree(self.lm_head)
        tied = isinstance(head, Linear) and self.shape.tie_embeddings
        return self._outer()._replace(layers=layers, lm_head=() if tied else head)

    def _outer(self) -> LMParams:
        """All weights but those of the layers, the head's own also where it is the embedding."""
        head_mhc = tree_of(self.head_mhc, Head) if hasattr(self, "head_mhc") else ()
        embedding, head = embedding_tree(self.embed_tokens), linear_tree(self.lm_head)
        return LMParams(embedding, (), norm_tree(self.norm), head, head_mhc)

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
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits `[b, s, v]`, and with `labels` the mean cross-entropy of each label given the tokens before it.

        Args:
            input_ids: tokens `[b, s]`.
            attention_mask: `[b, s]`, with a cache `[b, seen + s]`: 0 at padding; or what the attention takes.
            position_ids: `[b, s]`; None: counted from what the cache has seen.
            cache: transformers' keys and values of tokens before these; they are added to.
            past_key_values: another name of `cache`.
            inputs_embeds: `[b, s, c]` in place of `input_ids`.
            labels: `[b, s]`, the tokens themselves, which are shifted here; -100 is not counted.
            use_cache: None: as the config says, and never in training.
            output_hidden_states: also return the collapsed streams `[b, s, c]` of every depth, before the last norm.
            output_attentions: also return attention weights, where `attn_implementation` has them (`eager`).
            return_dict: False: a tuple.
            logits_to_keep: so many of the last positions get logits, 0 for all; or their indices.
            **options: for the attention function and the loss.

        Raises:
            ValueError: on both or neither of `input_ids` and `inputs_embeds`, or more tokens than `max_seq_len`.
        """
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            # Replicas of nn.DataParallel cannot hand caches back.
            use_cache = self.config.use_cache and not self.training and not getattr(self, "_is_replica", False)
        outer = self._outer()
        if input_ids is not None and inputs_embeds is None:
            x = fn.embedding(outer.embed_tokens, input_ids)
        elif inputs_embeds is not None and input_ids is None:
            x = inputs_embeds
        else:
            raise ValueError("give either input_ids or inputs_embeds")
        if x.shape[1] > self.shape.max_seq_len:
            raise ValueError(
                f"sequence of {x.shape[1]} tokens: longer than max_seq_len={self.shape.max_seq_len} of the model"
            )
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(x.shape[1], dtype=torch.int64, device=x.device) + seen).unsqueeze(0)
        given = {CACHE: cache, "position_ids": position_ids}
        mask = create_causal_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask, **given)
        cos, sin = fn.rotary_table(position_ids, self.shape.head_width, self.shape.rope_theta)
        hidden, states, attentions = fn.enter(x, self.shape), [x], []
        for layer in self.layers:
            streams, pre = hidden if isinstance(hidden, fn.EarlyPre) else (hidden, None)
            streams, pre, weights = layer(streams, pre, cos, sin, mask=mask, cache=cache, **options)
            hidden = streams if pre is None else fn.EarlyPre(streams, pre)
            attentions.append(weights)
            if output_hidden_states or (output_hidden_states is None and self.config.output_hidden_states):
                states.append(fn.collapse(outer, hidden, self.shape))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = fn.head(outer, tree_map(lambda part: part[:, kept], hidden), self.shape)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **options)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=tuple(states) if len(states) > 1 else None,
            attentions=tuple(attentions) if output_attentions else None,
            **{CACHE: cache if use_cache else None},
        )
        as_tuple = return_dict is False or (return_dict is None and not self.config.return_dict)
        return output.to_tuple() if as_tuple else output

    @torch.no_grad()
    def get_mhc_metrics(self, input_ids: Tensor | None = None) -> list[tuple[float, float]]:
        """The largest entry of `res` at each layer's attention and MLP, over the tokens of `input_ids [b, s]`.

        Without tokens, of the part that does not depend on the input. Without mHC the residual is the identity: 1, 1.
        """
        if not self.shape.mhc_enabled:
            return [(1.0, 1.0)] * self.shape.num_layers
        if input_ids is None:
            sites = [site.get_connection_matrix() for layer in self.layers for site in (layer.attn_mhc, layer.mlp_mhc)]
        else:
            # By their weights, also where hooks have the modules in their stead: those do not tell `res`.
            layers = tuple(
                layer.tree()._replace(attn_mhc=layer.attn_mhc.tree(), mlp_mhc=layer.mlp_mhc.tree())
                for layer in self.layers
            )
            sites = list(fn.backbone(self._outer()._replace(layers=layers), input_ids, self.shape).res)
        largest = torch.stack([res.abs().max() for res in sites]).tolist()
        return list(zip(largest[::2], largest[1::2], strict=True))

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any) -> None:
        """As in transformers; the weights carry a checksum each, in the metadata of their files."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        ours = not kwargs.get("variant") and not getattr(self, "_hf_peft_config_loaded", False)
        for file in weight_files(Path(save_directory)) if is_main_process and ours else ():
            add_checksums(file)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, verify: bool = True, **kwargs: Any) -> Any:
        """As in transformers, from a folder or the hub.

        Args:
            pretrained_model_name_or_path: the folder or name.
            *args: as there.
            verify: compare the weights of a folder with their checksums, about 3 GB/s.
            **kwargs: as there.

        Raises:
            FileNotFoundError: when a file of the folder is missing.
            ValueError: on a damaged file, or weights that do not fit the config; the message names the first
                difference. `ignore_mismatched_sizes=True` lets those that do not fit be initialised.
        """
        folder = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        lenient = kwargs.get("ignore_mismatched_sizes", False)
        plain = not any(kwargs.get(name) for name in ("variant", "gguf_file", "state_dict"))
        if folder.is_dir() and plain and not lenient and not (folder / "adapter_config.json").is_file():
            load_pretrained(folder, device="meta", verify=verify)
        if folder.is_dir() and not any((folder / name).is_file() for name in (CONFIG_FILE, GENERATION_FILE)):
            kwargs.setdefault("generation_config", GenerationConfig())  # transformers looks in no other file for it
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if not lenient and (info["missing_keys"] or info["unexpected_keys"]):
            missing, unexpected = (few(sorted(info[f"{kind}_keys"])) for kind in ("missing", "unexpected"))
            raise ValueError(
                f"{pretrained_model_name_or_path}: does not fit its config; missing {missing}, unexpected {unexpected}"
            )
        return (model, info) if wants_info else model

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Nothing: the module beside a checkpoint imports this library, so that no code is to be copied."""
