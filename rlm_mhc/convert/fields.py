"""`config.json` of Llama, Mistral, Qwen2 and Qwen3 as fields of `ModelConfig`, and back.

A key that transformers' config class knows and this library does not is refused unless it has the default. A key that
the class does not know has no effect on its model and passes.
"""

from collections.abc import Mapping
from typing import Any

from rlm_mhc.checkpoint.config_files import TRANSFORMERS_KEYS
from rlm_mhc.config import ModelConfig
from rlm_mhc.convert.layouts import ARCHITECTURES, Architecture, architecture_of

FIELDS = {
    "hidden_size": "hidden_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "ffn_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
ROTARY = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
WINDOW = ("sliding_window", "use_sliding_window", "layer_types")
# What neither logits nor loss depend on.
HARMLESS = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "attn_implementation",
    "initializer_range",
    "max_window_layers",
    "model_type",
    "name_or_path",
    "num_labels",
    "pretraining_tp",
    "tokenizer_class",
    "transformers.js_config",
}
# Keys that no config class declares but transformers' shared code reads, with their neutral values.
UNDECLARED = {"attention_chunk_size": None, "is_causal": True, "kv_sharing_modes": None, "per_layer_config": None}
SERVED = {*FIELDS, *ROTARY, *WINDOW, *TRANSFORMERS_KEYS, *HARMLESS, *UNDECLARED}


def ours_from_fields(fields: Mapping[str, Any], where: str, max_seq_len: int | None = None) -> dict[str, Any]:
    """Fields of `ModelConfig` from their `config.json`.

    Args:
        fields: what is in it.
        where: its name, for errors.
        max_seq_len: overrides `max_position_embeddings`; at most that. A sliding window may need it.

    Raises:
        ValueError: on a declared key with a value that this library does not support, or a missing key. Keys that the
            config class does not declare pass, see `unknown_keys`.

    >>> fields = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=100)
    >>> ours_from_fields(fields | dict(model_type="llama", max_position_embeddings=128), "file")["norm_eps"]
    1e-06
    """
    architecture = architecture_of(fields, where)
    _require_no_code(fields, where)
    _require_plain_weights(fields, where)
    _require_defaults(fields, where)
    given = {**architecture.absent, **fields}
    missing = [key for key in FIELDS if key not in given]
    if missing:
        raise ValueError(f"{where}: has no '{missing[0]}'")
    ours = {our: given[their] for their, our in FIELDS.items()} | dict(architecture.ours)
    if max_seq_len is not None:
        _require_fewer(max_seq_len, ours["max_seq_len"], where)
        ours["max_seq_len"] = max_seq_len
    _require_no_window(given, architecture, ours["max_seq_len"], where)
    return ours | {"rope_theta": _rope_theta(given, where)}


def unknown_keys(fields: Mapping[str, Any]) -> list[str]:
    """Keys of a `config.json` that transformers' config class of its `model_type` does not know.

    >>> unknown_keys({"model_type": "llama", "hidden_size": 8, "unsloth_fixed": True})
    ['unsloth_fixed']
    """
    defaults = _defaults(fields)
    return [key for key in fields if key not in SERVED and key not in defaults]


def _defaults(fields: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[fields["model_type"]]().to_dict()


def _require_no_code(fields: Mapping[str, Any], where: str) -> None:
    if fields.get("auto_map"):
        raise ValueError(
            f"{where}: auto_map={fields['auto_map']!r}: code of its own, which may compute something else; "
            f"remove the key where the model is a plain {fields['model_type']}"
        )


def _require_plain_weights(fields: Mapping[str, Any], where: str) -> None:
    """Raise on quantised weights; `quant_method="gguf"` passes, since transformers has dequantised those."""
    how = fields.get("quantization_config")
    if how is not None and not (isinstance(how, Mapping) and how.get("quant_method") == "gguf"):
        raise ValueError(
            f"{where}: quantization_config={how!r}: this library reads weights that are not quantised; "
            "save what model.dequantize() returns"
        )


def _require_defaults(fields: Mapping[str, Any], where: str) -> None:
    defaults = {key: value for key, value in _defaults(fields).items() if key not in SERVED} | UNDECLARED
    for key, default in defaults.items():
        if key in fields and fields[key] != default:
            raise ValueError(f"{where}: {key}={fields[key]!r}: this library has only {default!r}")


def _require_fewer(wanted: int, theirs: Any, where: str) -> None:
    if isinstance(theirs, int) and wanted > theirs:
        raise ValueError(f"max_seq_len={wanted}: more than the max_position_embeddings={theirs} of {where}")


def _rope_theta(given: Mapping[str, Any], where: str) -> Any:
    rope = given.get("rope_scaling") or given.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"{where}: rope_parameters={rope!r}: expected a group of keys")
    kind = rope.get("rope_type", rope.get("type", "default"))
    scales = [rope.get("partial_rotary_factor"), given.get("partial_rotary_factor"), rope.get("factor")]
    others = set(rope) - {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"}
    if kind not in ("default", "linear") or any(x not in (None, 1.0) for x in scales) or others:
        shown = dict(rope) | {key: given[key] for key in ("partial_rotary_factor",) if given.get(key) is not None}
        raise ValueError(f"{where}: rotary embedding {shown}: this library has the default one of all dimensions")
    return rope.get("rope_theta", given.get("rope_theta", 10000.0))


def _require_no_window(given: Mapping[str, Any], architecture: Architecture, max_seq_len: Any, where: str) -> None:
    """A window as long as the longest sequence hides nothing.

    Llama has none, but transformers' cache reads `sliding_window` and `layer_types` of any config.
    """
    used = given["use_sliding_window"] if "use_sliding_window" in architecture.absent else True
    window = given.get("sliding_window") if used else None
    types = given.get("layer_types") or []
    allowed = ["full_attention"] if window is None else ["full_attention", "sliding_attention"]
    if not isinstance(types, list) or any(kind not in allowed for kind in types):
        raise ValueError(f"{where}: layer_types={types!r}: this library has only full_attention")
    if window is not None and isinstance(max_seq_len, int) and not (isinstance(window, int) and window >= max_seq_len):
        raise ValueError(
            f"{where}: sliding_window={window}: this library has none, and sequences of up to {max_seq_len} tokens "
            f"would see it; give max_seq_len={window}"
        )


def theirs_from_config(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The architecture that a plain transformer of this library is, and its `config.json`.

    Raises:
        ValueError: for biases together with norms of queries and keys, which no class of transformers has.

    >>> theirs_from_config(ModelConfig())[0]
    'llama'
    """
    kinds = {(False, False): "llama", (True, False): "qwen2", (False, True): "qwen3"}
    kind = kinds.get((config.qkv_bias, config.qk_norm))
    if kind is None:
        raise ValueError("qkv_bias=True and qk_norm=True: no Llama-like architecture of transformers has both")
    architecture = ARCHITECTURES[kind]
    fields = {
        "architectures": [architecture.model_class],
        "model_type": kind,
        **{their: getattr(config, our) for their, our in FIELDS.items()},
        **architecture.fixed,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,  # where versions of transformers before 5 and other programs look for it
    }
    window = "use_sliding_window" in architecture.absent
    return kind, fields | ({"use_sliding_window": False} if window else {})
