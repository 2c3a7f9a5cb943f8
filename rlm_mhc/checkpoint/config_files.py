"""A model's shape on disk, for this library and for transformers: `config.json` and `config.yaml` say the same."""

import dataclasses
import difflib
import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlm_mhc.config import MODEL_TYPE, ModelConfig
from rlm_mhc.disk import replace_file
from rlm_mhc.validation import build, nearest

CONFIG_FILE, YAML_FILE = "config.json", "config.yaml"
GENERATION_FILE = "generation_config.json"
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
LARGEST_CONFIG_BYTES = 1 << 20
DEEPEST_CONFIG = 16
LONGEST_VALUE = 4096  # a path
CODE_FILE = "modeling_rlm_mhc.py"
CODE = '''"""The classes of this checkpoint, which are those of the package rlm-mhc."""

from rlm_mhc.model import RLMBackbone, RLMConfig, RLMForSequenceClassification, RLMModel

__all__ = ["RLMBackbone", "RLMConfig", "RLMForSequenceClassification", "RLMModel"]
'''
AUTO_MAP = {
    "AutoConfig": "modeling_rlm_mhc.RLMConfig",
    "AutoModel": "modeling_rlm_mhc.RLMBackbone",
    "AutoModelForCausalLM": "modeling_rlm_mhc.RLMModel",
    "AutoModelForSequenceClassification": "modeling_rlm_mhc.RLMForSequenceClassification",
}
FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))
# The names that transformers gives to fields.
THEIR_NAMES = {
    "hidden_size": "hidden_dim",
    "intermediate_size": "ffn_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
# What transformers itself writes beside the fields of a model.
TRANSFORMERS_KEYS = frozenset(
    [
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "quantization_config",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ]
)


def load_config(folder: Path) -> ModelConfig:
    """The model's shape from a checkpoint folder, by either of its two files.

    Raises:
        FileNotFoundError: when the folder, or both files, are missing.
        ValueError: on a damaged file, a wrong value, or where the two do not say the same.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such checkpoint folder")
    readers = {CONFIG_FILE: _from_json, YAML_FILE: _from_yaml}
    found = {folder / name: read for name, read in readers.items() if (folder / name).is_file()}
    if not found:
        raise FileNotFoundError(f"{folder}: not a checkpoint, it has no {CONFIG_FILE}")
    configs = {}
    for file, read in found.items():
        fields = read(file)
        try:
            configs[file.name] = build(ModelConfig, fields)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    first, *others = configs.values()
    for other in others:
        _require_equal(folder, first, other)
    return first


def read_fields(folder: Path) -> dict[str, Any]:
    """Return the contents of a folder's `config.json`, or an empty dict where there is none.

    Raises:
        ValueError: when it is no JSON object.
    """
    file = folder / CONFIG_FILE
    return read_json(file, LARGEST_CONFIG_BYTES) if file.is_file() else {}


def special_tokens(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids of special tokens in a `config.json`, by name."""
    return {name: fields[name] for name in SPECIAL_TOKENS if fields.get(name) is not None}


def quantization(folder: Path) -> Any:
    """Return the `quantization_config` in a folder's `config.json`; None where its weights are not quantised."""
    return read_fields(folder).get("quantization_config")


def write_config_files(
    folder: Path, config: ModelConfig, dtype: str, special_tokens: Mapping[str, Any] | None = None
) -> None:
    """Write both files, and the module by which transformers finds this library.

    `special_tokens` are the ids by name, as `eos_token_id`, that transformers reads from `config.json`.
    """
    fields = {
        **(special_tokens or {}),
        "architectures": ["RLMModel"],
        "auto_map": AUTO_MAP,
        "dtype": dtype,
        "model_type": MODEL_TYPE,
        **dataclasses.asdict(config),
    }
    text = json.dumps(fields, indent=2) + "\n"
    replace_file(folder / CONFIG_FILE, lambda file: file.write_text(text, encoding="utf-8"))
    write_yaml(folder / YAML_FILE, config)
    write_code(folder)


def write_yaml(file: Path, config: ModelConfig) -> None:
    """Write the section `model` of a run's config."""
    import yaml

    text = yaml.safe_dump({"model": dataclasses.asdict(config)}, sort_keys=False)
    replace_file(file, lambda path: path.write_text(text, encoding="utf-8"))


def write_generation_config(
    folder: Path, tokenizer: Any, base: Mapping[str, Any] | None = None, stop_token_ids: Sequence[int] = ()
) -> None:
    """Write what `base` says of generation, with more tokens at which it ends: the tokenizer's end of text and
    `stop_token_ids`; and a token with which it pads, if there is none."""
    base = base or {}
    stops = list(dict.fromkeys([*stop_tokens(base), tokenizer.eos_token_id, *stop_token_ids]))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # What begins with "_" says where the file came from, which is no longer so.
    kept = {name: value for name, value in base.items() if not name.startswith("_")}
    fields = {"pad_token_id": pad} | kept | {"eos_token_id": stops if len(stops) > 1 else stops[0]}
    text = json.dumps(fields, indent=2) + "\n"
    replace_file(folder / GENERATION_FILE, lambda file: file.write_text(text, encoding="utf-8"))


def load_generation_config(folder: Path) -> dict[str, Any]:
    """Return a folder's generation config: its `generation_config.json`, or without one the special tokens of its
    `config.json`, as transformers does; empty without either.

    Raises:
        ValueError: naming the file, when it is damaged, or ends generation at what is no token.
    """
    file = next((folder / name for name in (GENERATION_FILE, CONFIG_FILE) if (folder / name).is_file()), None)
    fields = read_json(file, LARGEST_CONFIG_BYTES) if file is not None else {}
    if file is not None and file.name == CONFIG_FILE:
        fields = special_tokens(fields)
    if not all(type(token) is int and token >= 0 for token in stop_tokens(fields)):
        raise ValueError(
            f"{file}: eos_token_id={fields['eos_token_id']!r}: expected the id of a token, or a list of ids"
        )
    return fields


def stop_tokens(generation: Mapping[str, Any]) -> list[int]:
    """The tokens at which a generation config ends generation.

    >>> [stop_tokens({"eos_token_id": found}) for found in (2, [2, 7], None)]
    [[2], [2, 7], []]
    """
    found = generation.get("eos_token_id")
    return found if isinstance(found, list) else [] if found is None else [found]


def write_code(folder: Path) -> None:
    """Write the module that `auto_map` names."""
    replace_file(folder / CODE_FILE, lambda file: file.write_text(CODE, encoding="utf-8"))


def read_json(file: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes.

    Raises:
        ValueError: naming the file, when there is no such thing in it.
    """
    try:
        fields = json.loads(_text(file, limit))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(fields).__name__}")
    return fields


def read_yaml(file: Path) -> Any:
    """The values in a YAML file of a config.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming the file, when it is none, or larger or deeper than one can be.
    """
    import yaml

    try:
        text = _text(file, LARGEST_CONFIG_BYTES)
        _require_simple(text)
        return yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{file}: not a config of this library ({' '.join(str(error).split())})") from None


def _text(file: Path, limit: int) -> str:
    if file.stat().st_size > limit:
        raise ValueError(f"{file}: {file.stat().st_size} bytes, more than such a file can have ({limit})")
    return file.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark


def _require_simple(text: str) -> None:
    """Refuse aliases, a few bytes of which can stand for more values than memory holds, and what PyYAML takes time for
    that grows with its square: deep nesting, and numbers of base 60 (`1:30:00`). A config has none of these."""
    import yaml

    depth = 0
    for event in yaml.parse(text):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has aliases")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > LONGEST_VALUE:
            raise ValueError(f"it has a value of more than {LONGEST_VALUE} characters")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST_CONFIG:
            raise ValueError(f"it is nested more than {DEEPEST_CONFIG} deep")


def _from_json(file: Path) -> dict[str, Any]:
    fields = read_json(file, LARGEST_CONFIG_BYTES)
    if fields.pop("model_type", None) != MODEL_TYPE:
        raise ValueError(f"{file}: not a model of this library (expected model_type '{MODEL_TYPE}')")
    try:
        return split_fields(fields, TRANSFORMERS_KEYS)[0]
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def split_fields(fields: Mapping[str, Any], known: Container[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a model, under their own names, and what else there is.

    Raises:
        ValueError: on two names of one field that differ, and on a name that is not known and looks like a misspelt
            field.
    """
    others = dict(fields)
    for theirs, ours in THEIR_NAMES.items():
        if theirs in others and others.setdefault(ours, others[theirs]) != others.pop(theirs):
            raise ValueError(f"{theirs}={fields[theirs]!r} and {ours}={fields[ours]!r}: two names of one field")
    own = {name: others.pop(name) for name in FIELDS if name in others}
    for name in others:
        if name not in known and (name.startswith("mhc_") or difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.85)):
            raise ValueError(f"unknown key '{name}'{nearest(name, FIELDS)}; known are {', '.join(FIELDS)}")
    return own, others


def _from_yaml(file: Path) -> dict[str, Any]:
    values = read_yaml(file)
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise ValueError(f"{file}: not a config of this library (it has no section 'model')")
    return values["model"]


def _require_equal(folder: Path, json_config: ModelConfig, yaml_config: ModelConfig) -> None:
    pairs = {
        f.name: (getattr(json_config, f.name), getattr(yaml_config, f.name)) for f in dataclasses.fields(ModelConfig)
    }
    different = [f"{name}={a} and {name}={b}" for name, (a, b) in pairs.items() if a != b]
    if different:
        raise ValueError(f"{folder}: {CONFIG_FILE} and {YAML_FILE} do not say the same: {', '.join(different)}")
