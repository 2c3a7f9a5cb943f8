"""Models to convert: in memory, in a folder or in a GGUF file, read a few weights at a time."""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlm_mhc.checkpoint.config_files import (
    GENERATION_FILE,
    TRANSFORMERS_KEYS,
    read_fields,
    special_tokens,
)
from rlm_mhc.checkpoint.shards import Read, stored_tensors
from rlm_mhc.checkpoint.weights import INDEX_FILE, WEIGHTS_FILE
from rlm_mhc.convert.gguf import gguf_tokenizer, is_gguf, load_gguf

# What a tokenizer of transformers reads beside the weights, how the model is to be prompted and sampled, and under
# which terms it may be used. Not carried: model cards, code of models, the state of a run.
COMPANIONS = (
    "tokenizer*",
    "tokenization_*.py",  # a tokenizer with code of its own needs it
    "*tokens*.json",
    "*.tokenizer",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "bpe.codes",
    "byte_maps.json",
    "emoji.json",
    "entity_vocab.json",
    "normalizer.json",
    "word_*.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    GENERATION_FILE,
    "[Ll][Ii][Cc][Ee][Nn][CScs][Ee]*",
    "COPYING*",
    "NOTICE*",
    "USE_POLICY*",
)


class Source(NamedTuple):
    """A model to convert.

    - `fields`: its `config.json`
    - `described`: every weight on the meta device
    - `read`: `read(names)` loads these weights
    - `where`: its name, for errors
    - `accompany`: `accompany(folder)` copies tokenizer, chat template, generation config and licence
    """

    fields: Mapping[str, Any]
    described: Mapping[str, Tensor]
    read: Read
    where: str
    accompany: Callable[[Path], None]


def source_of(model_or_path: Any) -> Source:
    """A module of transformers, a folder that one was saved into, or a GGUF file.

    Raises:
        FileNotFoundError: when the folder or a file of it is missing.
        ValueError: on a damaged file, or weights that are pickled only.
    """
    if isinstance(model_or_path, torch.nn.Module):
        return _module_source(model_or_path, type(model_or_path).__name__)
    path = Path(model_or_path)
    if path.is_file():
        return _gguf_source(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder or GGUF file")
    _require_safetensors(path)
    return folder_source(path)


def folder_source(folder: Path) -> Source:
    """A folder with `config.json` and safetensors.

    Raises:
        FileNotFoundError: when a file of it is missing.
        ValueError: on a damaged file.
    """
    companions = partial(copy_companions, folder)
    return Source(read_fields(folder), *stored_tensors(folder), str(folder), companions)


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


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the files that `COMPANIONS` names; sampling options of an old `config.json` become a generation config."""
    for pattern in COMPANIONS:
        for file in filter(Path.is_file, source.glob(pattern)):
            copy = folder / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
    fields = read_fields(source)
    if not (source / GENERATION_FILE).is_file() and (sampling := sampling_options(fields)):
        _write_generation(sampling | special_tokens(fields), folder)


def sampling_options(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the generation options in a `config.json`, where transformers looks for them in the absence of a
    `generation_config.json`."""
    from transformers import GenerationConfig

    names = set(GenerationConfig().to_dict()) - TRANSFORMERS_KEYS
    return {name: value for name, value in fields.items() if name in names and value is not None}


def _module_source(model: Any, where: str) -> Source:
    def accompany(folder: Path) -> None:
        if (generation := getattr(model, "generation_config", None)) is not None:
            _write_generation(generation.to_diff_dict(), folder)

    return Source(model.config.to_dict(), *held_tensors(model.state_dict()), where, accompany)


def _gguf_source(file: Path) -> Source:
    if not is_gguf(file):
        raise ValueError(f"{file}: neither a folder nor a GGUF file; name the folder that the weights are in")
    source = _module_source(load_gguf(file), str(file))

    def accompany(folder: Path) -> None:
        source.accompany(folder)
        gguf_tokenizer(file).save_pretrained(folder)

    return source._replace(accompany=accompany)


def _write_generation(fields: Mapping[str, Any], folder: Path) -> None:
    # What begins with "_" describes the file that the options came from.
    public = {name: value for name, value in fields.items() if not name.startswith("_")}
    (folder / GENERATION_FILE).write_text(json.dumps(public, indent=2) + "\n", encoding="utf-8")


def _require_safetensors(folder: Path) -> None:
    pickled = sorted(file.name for file in folder.glob("pytorch_model*.bin"))
    if pickled and not any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)):
        raise ValueError(
            f"{folder / pickled[0]}: a pickle, which could run code, is not read; write safetensors first: "
            f"AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained('new folder')"
        )
