"""A model on disk: `config.json` and `model.safetensors`, keys being the dotted names of the tree."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.params import LMParams, weight_table
from rlm_mhc.tree import from_named, named_leaves
from rlm_mhc.validation import build

MODEL_TYPE = "rlm_mhc"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def save_pretrained(path: str | os.PathLike, params: LMParams, config: ModelConfig) -> None:
    """Write `config.json` and `model.safetensors` into the folder `path`, made if it is missing.

    Each file replaces its predecessor only when it is whole.

    Raises:
        ValueError: when the tree is not one of this config (names and shapes).

    >>> import tempfile; from rlm_mhc import fn
    >>> config = ModelConfig.preset("tiny")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pretrained(folder, fn.init(config), config)
    ...     params, same = load_pretrained(folder)
    >>> same == config
    True
    """
    from safetensors.torch import save_file

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    named = {name: leaf.detach().contiguous() for name, leaf in named_leaves(params).items()}
    _check_names(named, config, "the tree")
    text = json.dumps({"model_type": MODEL_TYPE, **dataclasses.asdict(config)}, indent=2) + "\n"
    _replace(folder / CONFIG_FILE, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    _replace(folder / WEIGHTS_FILE, lambda temporary: save_file(named, temporary, metadata={"format": "pt"}))


def load_pretrained(path: str | os.PathLike, *, device: torch.device | str = "cpu") -> tuple[LMParams, ModelConfig]:
    """Read what `save_pretrained` wrote: `(params, config)`, bit-equal, in the dtypes of the file.

    Raises:
        FileNotFoundError: when the folder or one of its two files is missing.
        ValueError: on a damaged file, or one that does not fit its config; the message names the first difference.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(path)
    config = load_config(folder)
    weights = _existing(folder, WEIGHTS_FILE)
    try:
        named = load_file(weights, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{weights}: damaged or not a safetensors file ({error})") from None
    _check_names(named, config, str(weights))
    return from_named(weight_table(config), named), config


def load_config(folder: Path) -> ModelConfig:
    """The model's shape from a checkpoint folder; errors as in `load_pretrained`."""
    file = _existing(folder, CONFIG_FILE)
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(fields, dict) or fields.pop("model_type", None) != MODEL_TYPE:
        raise ValueError(f"{file}: not a model of this library (expected model_type '{MODEL_TYPE}')")
    try:
        return build(ModelConfig, fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _existing(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such checkpoint folder")
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder}: not a checkpoint, it has no {name}")
    return folder / name


def _check_names(named: dict[str, Tensor], config: ModelConfig, where: str) -> None:
    expected = named_leaves(weight_table(config))
    missing, unexpected = [k for k in expected if k not in named], [k for k in named if k not in expected]
    if missing or unexpected:
        raise ValueError(f"{where}: does not fit its config; missing {_few(missing)}, unexpected {_few(unexpected)}")
    for name, spec in expected.items():
        if tuple(named[name].shape) != spec.shape:
            raise ValueError(f"{where}: {name} has shape {tuple(named[name].shape)}, its config needs {spec.shape}")


def _few(words: list[str]) -> str:
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "") if words else "nothing"


def _replace(file: Path, write: Any) -> None:
    temporary = file.with_name(file.name + ".tmp")
    write(temporary)
    # safetensors makes its files private; a checkpoint has the permissions of any other new file.
    mask = os.umask(0)
    os.umask(mask)
    temporary.chmod(0o666 & ~mask)
    os.replace(temporary, file)
