"""A model on disk: `config.json` and `model.safetensors`, keys being the dotted names of the tree."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlm_mhc.checkpoint.tensors import read_tensors, write_tensors
from rlm_mhc.config import ModelConfig
from rlm_mhc.disk import replace_file
from rlm_mhc.params import LMParams, weight_table
from rlm_mhc.tree import from_named, named_leaves
from rlm_mhc.validation import build

MODEL_TYPE = "rlm_mhc"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST_CONFIG_BYTES = 1 << 20
NAMES_SHOWN = 3


def save_pretrained(path: str | os.PathLike, params: LMParams, config: ModelConfig) -> None:
    """Write `config.json` and `model.safetensors` into the folder `path`, made if it is missing.

    Each file replaces its predecessor only when it is whole and on the disk. The weights carry a checksum each, in
    the file's metadata.

    Raises:
        ValueError: when the tree is not one of this config (names, shapes, dtypes).
        OSError: when it cannot be written; the former files are there then.

    >>> import tempfile; from rlm_mhc import fn
    >>> config = ModelConfig.preset("tiny")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pretrained(folder, fn.init(config), config)
    ...     params, same = load_pretrained(folder)
    >>> same == config
    True
    """
    folder = Path(path)
    named = named_leaves(params)
    _require_weights(named, config, "the tree")
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"model_type": MODEL_TYPE, **dataclasses.asdict(config)}, indent=2) + "\n"
    replace_file(folder / CONFIG_FILE, lambda file: file.write_text(text, encoding="utf-8"))
    replace_file(folder / WEIGHTS_FILE, lambda file: write_tensors(file, named))


def load_pretrained(
    path: str | os.PathLike, *, device: torch.device | str = "cpu", verify: bool = True
) -> tuple[LMParams, ModelConfig]:
    """Read what `save_pretrained` wrote: `(params, config)`, bit-equal, in the dtypes of the file.

    Args:
        path: the folder.
        device: where the weights go.
        verify: compare the weights with their checksums, about 3 GB/s; without it a damaged byte goes unnoticed.

    Raises:
        FileNotFoundError: when the folder or one of its two files is missing.
        ValueError: on a damaged file, or one that does not fit its config; the message names the first difference.
    """
    folder = Path(path)
    config = load_config(folder)
    file = _existing(folder, WEIGHTS_FILE)
    named = read_tensors(file, device, verify=verify)
    _require_weights(named, config, str(file))
    return from_named(weight_table(config), named), config


def load_config(folder: Path) -> ModelConfig:
    """The model's shape from a checkpoint folder; errors as in `load_pretrained`."""
    file = _existing(folder, CONFIG_FILE)
    fields = read_json(file, LARGEST_CONFIG_BYTES)
    if fields.pop("model_type", None) != MODEL_TYPE:
        raise ValueError(f"{file}: not a model of this library (expected model_type '{MODEL_TYPE}')")
    try:
        return build(ModelConfig, fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def read_json(file: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes.

    Raises:
        ValueError: naming the file, when there is no such thing in it.
    """
    if file.stat().st_size > limit:
        raise ValueError(f"{file}: {file.stat().st_size} bytes, more than such a file can have ({limit})")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(fields).__name__}")
    return fields


def require_fit(named: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse tensors that are others than wanted: names, shapes, or a dtype that is no floating-point one.

    Raises:
        ValueError: with the kind of the first difference and the first few names it concerns.
    """
    missing, unexpected = [k for k in shapes if k not in named], [k for k in named if k not in shapes]
    if missing or unexpected:
        raise ValueError(f"{where}: does not fit its config; missing {_few(missing)}, unexpected {_few(unexpected)}")
    wrong = [f"{k} has {tuple(named[k].shape)}, not {shape}" for k, shape in shapes.items() if named[k].shape != shape]
    if wrong:
        raise ValueError(f"{where}: shapes do not fit its config: {_few(wrong)}")
    wrong = [f"{k} is {named[k].dtype}" for k in shapes if named[k].dtype not in DTYPES]
    if wrong:
        raise ValueError(f"{where}: dtypes are not floating-point ones of 16 to 64 bits: {_few(wrong)}")


def _existing(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such checkpoint folder")
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder}: not a checkpoint, it has no {name}")
    return folder / name


def _require_weights(named: Mapping[str, Tensor], config: ModelConfig, where: str) -> None:
    require_fit(named, {name: spec.shape for name, spec in named_leaves(weight_table(config)).items()}, where)


def _few(words: list[str]) -> str:
    more = f" and {len(words) - NAMES_SHOWN} more" if len(words) > NAMES_SHOWN else ""
    return ", ".join(words[:NAMES_SHOWN]) + more if words else "nothing"
