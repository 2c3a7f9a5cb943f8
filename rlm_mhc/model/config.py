"""`ModelConfig` as transformers knows configs."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from rlm_mhc.checkpoint.config_files import (
    AUTO_MAP,
    CONFIG_FILE,
    FIELDS,
    THEIR_NAMES,
    YAML_FILE,
    load_config,
    split_fields,
    write_code,
    write_yaml,
)
from rlm_mhc.config import MODEL_TYPE, ModelConfig
from rlm_mhc.validation import build

# Arguments of `from_pretrained` that say where a file comes from, not what is in it.
HOW_TO_FETCH = frozenset(
    [
        "_commit_hash",
        "_from_auto",
        "_from_pipeline",
        "cache_dir",
        "force_download",
        "local_files_only",
        "proxies",
        "revision",
        "subfolder",
        "token",
        "trust_remote_code",
    ]
)


KERNELS = ("auto", "reference", "triton")


class RLMConfig(PretrainedConfig):
    """The fields of `ModelConfig`, under their names and those that transformers gives them (`hidden_size`, …).

    Args:
        kernels: what mixes the streams: `auto`, `reference` or `triton`; see `rlm_mhc.model.kernels`. Not saved.
        **fields: of `ModelConfig`, or of any `PretrainedConfig`.

    Raises:
        ValueError: on a wrong value, or a name that looks like a misspelt field.

    >>> RLMConfig(hidden_size=256, num_layers=4, num_heads=4).model_config.ffn_dim
    704
    """

    model_type = MODEL_TYPE
    attribute_map = THEIR_NAMES
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012

    def __init__(self, *, kernels: str = "auto", **fields: Any) -> None:
        if kernels not in KERNELS:
            raise ValueError(f"kernels={kernels!r}: expected one of {', '.join(KERNELS)}")
        self.kernels = kernels
        own, fields = split_fields(fields, dir(PretrainedConfig))
        for name, value in dataclasses.asdict(build(ModelConfig, own)).items():
            setattr(self, name, value)
        self.use_cache = fields.pop("use_cache", True)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(self, name, fields.pop(name, None))
        self.auto_map = {**AUTO_MAP, **fields.pop("auto_map", {})}
        super().__init__(**fields)

    @property
    def model_config(self) -> ModelConfig:
        """The shape, validated.

        Raises:
            ValueError: where a field was set to a wrong value since.
        """
        return ModelConfig(**{name: getattr(self, name) for name in FIELDS})

    def to_dict(self) -> dict[str, Any]:
        """All fields, those of the model also under the names that transformers gives them."""
        _add_peft_defaults()  # peft reads the config as a dict before it looks for its defaults by `model_type`
        theirs = {name: getattr(self, ours) for name, ours in self.attribute_map.items()}
        return {**super().to_dict(), **theirs}

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to `config.json`: all fields of the model, of the others what is no default."""
        fields = super().to_diff_dict().items()
        own = {name: value for name, value in fields if name not in self.attribute_map and name != "kernels"}
        return {**own, **dataclasses.asdict(self.model_config)}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `config.json`, `config.yaml`, and the module that programs find this library by."""
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        write_yaml(Path(save_directory) / YAML_FILE, self.model_config)
        write_code(Path(save_directory))

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers, and of a folder that has `config.yaml` alone, from that.

        Raises:
            ValueError: where the folder's two files do not say the same.
        """
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if not (folder / YAML_FILE).is_file():
            return super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        config = load_config(folder)
        if (folder / CONFIG_FILE).is_file():
            return super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        rest = {name: value for name, value in kwargs.items() if name not in HOW_TO_FETCH}
        return {"model_type": MODEL_TYPE, **dataclasses.asdict(config)}, rest

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: the module beside a checkpoint imports this library, so that no code is to be copied."""


def as_rlm_config(config: RLMConfig | ModelConfig) -> RLMConfig:
    """Return an `RLMConfig` as it is, and one of the same fields for a `ModelConfig`."""
    return RLMConfig(**dataclasses.asdict(config)) if isinstance(config, ModelConfig) else config


def _add_peft_defaults() -> None:
    """Add the target modules of Llama, which have the same names here, to the tables of peft if it is imported."""
    constants = sys.modules.get("peft.utils.constants")
    for name, table in vars(constants).items() if constants else ():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and "llama" in table:
            table.setdefault(MODEL_TYPE, table["llama"])
