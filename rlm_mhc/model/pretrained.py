"""What the models share: initial weights, loading, saving, and the weights' names on disk."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers import initialization as init

from rlm_mhc.checkpoint.config_files import CONFIG_FILE, GENERATION_FILE, load_config, quantization
from rlm_mhc.checkpoint.tensors import add_checksums
from rlm_mhc.checkpoint.weights import abbreviate, read_files, read_weights, weight_files
from rlm_mhc.config import ModelConfig
from rlm_mhc.model.config import RLMConfig, as_rlm_config
from rlm_mhc.params import INIT_STD, LMParams, weight_table
from rlm_mhc.tree import named_leaves

# Pattern of the backbone's names on disk, and their names in a model with a head.
FROM_DISK = {f"^({'|'.join(name for name in LMParams._fields if name != 'lm_head')})": r"model.\1"}
# Weights of the heads of these models, by their names on disk.
HEADS = frozenset({"lm_head.weight", "score.weight"})


class RLMPreTrainedModel(PreTrainedModel):
    """Base class of the models.

    On disk a weight has its name in `fn`'s tree, `layers.3.attn_mhc.phi`, whatever class wrote it. A model with a head
    holds its backbone as the module `model`; `load_state_dict` takes the names with and without that prefix.
    """

    config_class = RLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = True
    # peft renames the weights of adapters by it: they have the names on disk in a folder of this library.
    _checkpoint_conversion_mapping = FROM_DISK
    # Head weights, by their names on disk, that a folder may lack or hold in excess.
    optional_weights: frozenset[str] = frozenset()

    def __init__(self, config: RLMConfig | ModelConfig) -> None:
        super().__init__(as_rlm_config(config))

    def _init_weights(self, module: nn.Module) -> None:
        prefix = next((name for name, other in self.named_modules() if other is module), "")
        prefix = prefix.removeprefix(f"{self.base_model_prefix}.")
        specs = named_leaves(weight_table(self.config.model_config))
        for name, parameter in module.named_parameters(recurse=False):
            spec = specs.get(f"{prefix}.{name}")
            if spec is not None and not parameter.is_meta:
                initial = spec.init(f"{prefix}.{name}", torch.initial_seed(), parameter.device, parameter.dtype)
                init.copy_(parameter, initial)
            elif isinstance(module, (nn.Linear, nn.Embedding)) and name == "weight":
                init.normal_(parameter, std=INIT_STD)  # a resized layer, or a head that no tree of `fn` has

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        base = self._modules.get(self.base_model_prefix)
        for name in [name for name in state_dict if base is not None and name.startswith(prefix)]:
            rest = name.removeprefix(prefix)
            if rest.partition(".")[0] in base._modules:
                state_dict[f"{prefix}{self.base_model_prefix}.{rest}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)

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
                difference. `ignore_mismatched_sizes=True` initialises the weights that do not fit. The head of another
                class may be in the folder, and a classifier's own may be missing, which transformers reports.
        """
        folder = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        lenient = kwargs.get("ignore_mismatched_sizes", False)
        plain = not any(kwargs.get(name) for name in ("variant", "gguf_file", "state_dict"))
        quantized = folder.is_dir() and quantization(folder) is not None
        if folder.is_dir() and plain and not lenient and not (folder / "adapter_config.json").is_file():
            if quantized:  # names and shapes are those of the quantisation's library
                read_files(folder, "meta", verify=verify)
            else:
                read_weights(folder, load_config(folder), "meta", verify=verify, optional=cls.optional_weights)
        if folder.is_dir() and not any((folder / name).is_file() for name in (CONFIG_FILE, GENERATION_FILE)):
            kwargs.setdefault("generation_config", GenerationConfig())  # transformers looks in no other file for it
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if not lenient:
            known = {"unexpected_keys": ()} if quantized else {}
            cls._require_all(info | known, str(pretrained_model_name_or_path))
        return (model, info) if wants_info else model

    @classmethod
    def _require_all(cls, info: dict[str, Any], where: str) -> None:
        missing, unexpected = (
            sorted(set(info[kind]) - cls.optional_weights) for kind in ("missing_keys", "unexpected_keys")
        )
        if missing or unexpected:
            lists = f"missing {abbreviate(missing)}, unexpected {abbreviate(unexpected)}"
            raise ValueError(f"{where}: does not fit its config; {lists}")

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: the module beside a checkpoint imports this library, so that no code is to be copied."""
