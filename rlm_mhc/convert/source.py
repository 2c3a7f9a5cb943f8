"""Models to convert: in memory or in a folder, read a few weights at a time."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlm_mhc.checkpoint.config_files import CONFIG_FILE, LARGEST_CONFIG_BYTES, read_json
from rlm_mhc.checkpoint.shards import Read, stored_tensors
from rlm_mhc.checkpoint.weights import INDEX_FILE, WEIGHTS_FILE

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class Source(NamedTuple):
    """A model: its `config.json`, every weight on the meta device, `read(names)` for some of them, its name for
    errors, and its folder if it has one."""

    fields: Mapping[str, Any]
    described: Mapping[str, Tensor]
    read: Read
    where: str
    folder: Path | None


def source_of(model_or_dir: Any) -> Source:
    """A module of transformers, or a folder that one was saved into.

    Raises:
        FileNotFoundError: when the folder or a file of it is missing.
        ValueError: on a damaged file, or weights that are pickled only.
    """
    if isinstance(model_or_dir, torch.nn.Module):
        config: Any = model_or_dir.config
        return Source(config.to_dict(), *held_tensors(model_or_dir.state_dict()), type(model_or_dir).__name__, None)
    folder = Path(model_or_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    fields = read_fields(folder)
    _require_safetensors(folder)
    return Source(fields, *stored_tensors(folder), str(folder), folder)


def read_fields(folder: Path) -> dict[str, Any]:
    """What a folder's `config.json` holds; nothing if there is none.

    Raises:
        ValueError: when it is no JSON object.
    """
    file = folder / CONFIG_FILE
    return read_json(file, LARGEST_CONFIG_BYTES) if file.is_file() else {}


def held_tensors(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Read]:
    """Tensors in memory, described on the meta device, and `read(names)` for copies of some of them."""

    def read(names: list[str]) -> dict[str, Tensor]:
        return {name: named[name].detach().to("cpu", copy=True).contiguous() for name in names}

    return {name: tensor.detach().to("meta") for name, tensor in named.items()}, read


def renamed(read: Read, origin: Mapping[str, str]) -> Read:
    """`read` under new names, `origin` having the former one of each.

    >>> renamed(lambda names: {name: torch.ones(1) for name in names}, {"new": "old"})(["new"])
    {'new': tensor([1.])}
    """

    def read_renamed(names: list[str]) -> dict[str, Tensor]:
        found = read([origin[name] for name in names])
        return {name: found[origin[name]] for name in names}

    return read_renamed


def companions(source: Source, folder: Path) -> None:
    """Copy a source's tokenizer and generation config into a folder."""
    for name in COMPANIONS:
        if source.folder is not None and (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)


def special_tokens(source: Source) -> dict[str, Any]:
    """The ids of a source's special tokens by name."""
    return {name: source.fields[name] for name in SPECIAL_TOKENS if source.fields.get(name) is not None}


def _require_safetensors(folder: Path) -> None:
    pickled = sorted(file.name for file in folder.glob("pytorch_model*.bin"))
    if pickled and not any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)):
        raise ValueError(
            f"{folder / pickled[0]}: a pickle, which could run code, is not read; write safetensors first: "
            f"AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained('new folder')"
        )
