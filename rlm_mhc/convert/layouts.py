"""Llama and what differs from it by a table: weights by name, `config.json` by key, as transformers writes them.

A name or key that is in no table is refused: what it stands for would be lost without a word.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from rlm_mhc.checkpoint.config_files import TRANSFORMERS_KEYS
from rlm_mhc.config import ModelConfig
from rlm_mhc.validation import nearest

WEIGHTS = {
    "model.embed_tokens.weight": "embed_tokens.weight",
    "model.layers.#.input_layernorm.weight": "layers.#.input_layernorm.weight",
    "model.layers.#.self_attn.q_proj.weight": "layers.#.self_attn.q_proj.weight",
    "model.layers.#.self_attn.k_proj.weight": "layers.#.self_attn.k_proj.weight",
    "model.layers.#.self_attn.v_proj.weight": "layers.#.self_attn.v_proj.weight",
    "model.layers.#.self_attn.o_proj.weight": "layers.#.self_attn.o_proj.weight",
    "model.layers.#.post_attention_layernorm.weight": "layers.#.post_attention_layernorm.weight",
    "model.layers.#.mlp.gate_proj.weight": "layers.#.mlp.gate_proj.weight",
    "model.layers.#.mlp.up_proj.weight": "layers.#.mlp.up_proj.weight",
    "model.layers.#.mlp.down_proj.weight": "layers.#.mlp.down_proj.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}
BIASES = {
    "model.layers.#.self_attn.q_proj.bias": "layers.#.self_attn.q_proj.bias",
    "model.layers.#.self_attn.k_proj.bias": "layers.#.self_attn.k_proj.bias",
    "model.layers.#.self_attn.v_proj.bias": "layers.#.self_attn.v_proj.bias",
}
NORMS = {
    "model.layers.#.self_attn.q_norm.weight": "layers.#.self_attn.q_norm.weight",
    "model.layers.#.self_attn.k_norm.weight": "layers.#.self_attn.k_norm.weight",
}
# Old checkpoints hold what follows from rope_theta.
DERIVED = ("model.layers.#.self_attn.rotary_emb.inv_freq",)

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
HARMLESS = (TRANSFORMERS_KEYS - {"auto_map", "quantization_config"}) | {
    "_attn_implementation_autoset",
    "initializer_range",
    "is_llama_config",
    "max_window_layers",
    "model_type",
    "pretraining_tp",
    "tokenizer_class",
    "transformers.js_config",
}
# What some checkpoints have in addition, without effect at this value.
NEUTRAL = {"quantization_config": None, "rope_interleaved": False, "use_mrope": False}


class Architecture(NamedTuple):
    """One model class of transformers.

    - `weights`: their names, `#` being a layer's number, and ours
    - `ours`: fields of `ModelConfig` that the class alone decides
    - `absent`: what transformers takes for a key that `config.json` lacks
    - `fixed`: keys with the one value that this library can do
    - `window`: whether there are keys of a sliding window
    """

    model_class: str
    weights: Mapping[str, str]
    ours: Mapping[str, Any]
    absent: Mapping[str, Any]
    fixed: Mapping[str, Any]
    window: bool = True


ABSENT = {"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
FIXED = {"hidden_act": "silu", "attention_dropout": 0.0}
UNBIASED = {"attention_bias": False}

ARCHITECTURES = {
    "llama": Architecture(
        "LlamaForCausalLM", WEIGHTS, {}, ABSENT, FIXED | UNBIASED | {"mlp_bias": False}, window=False
    ),
    "mistral": Architecture(
        "MistralForCausalLM", WEIGHTS, {}, ABSENT | {"num_key_value_heads": 8, "sliding_window": 4096}, FIXED
    ),
    "qwen2": Architecture(
        "Qwen2ForCausalLM",
        WEIGHTS | BIASES,
        {"qkv_bias": True},
        ABSENT | {"num_key_value_heads": 32, "use_sliding_window": False},
        FIXED,
    ),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        WEIGHTS | NORMS,
        {"qk_norm": True},
        ABSENT | {"num_key_value_heads": 32, "head_dim": 128, "use_sliding_window": False},
        FIXED | UNBIASED,
    ),
}


def architecture_of(fields: Mapping[str, Any], where: str) -> Architecture:
    """The row of `ARCHITECTURES` that a `config.json` names.

    Raises:
        ValueError: on another `model_type`.
    """
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(f"{where}: model_type={kind!r}: expected one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[kind]


def ours_from_names(names: Iterable[str], architecture: Architecture, where: str) -> dict[str, str]:
    """Our name for each of their weights; names that stand for nothing of their own are left out.

    Raises:
        ValueError: on a name that the architecture does not have.

    >>> ours_from_names(["model.layers.3.mlp.up_proj.weight"], ARCHITECTURES["llama"], "file")
    {'model.layers.3.mlp.up_proj.weight': 'layers.3.mlp.up_proj.weight'}
    """
    found = {}
    for name in names:
        pattern, number = _pattern(name)
        if pattern in DERIVED:
            continue
        if pattern not in architecture.weights:
            raise ValueError(
                f"{where}: unknown weight '{name}', {architecture.model_class} has none of that name"
                f"{nearest(pattern, architecture.weights)}"
            )
        found[name] = architecture.weights[pattern].replace("#", number)
    return found


def theirs_from_names(names: Iterable[str], architecture: Architecture) -> dict[str, str]:
    """Their name for each of our weights; the inverse of `ours_from_names`.

    >>> theirs_from_names(["norm.weight"], ARCHITECTURES["llama"])
    {'norm.weight': 'model.norm.weight'}
    """
    table = {ours: theirs for theirs, ours in architecture.weights.items()}
    found = {}
    for name in names:
        pattern, number = _pattern(name)
        found[name] = table[pattern].replace("#", number)
    return found


def _pattern(name: str) -> tuple[str, str]:
    number = re.search(r"(?<=\.)\d+(?=\.)", name)
    return (name.replace(f".{number[0]}.", ".#.", 1), number[0]) if number else (name, "")


def ours_from_fields(fields: Mapping[str, Any], where: str, max_seq_len: int | None = None) -> dict[str, Any]:
    """Fields of `ModelConfig` from their `config.json`.

    Args:
        fields: what is in it.
        where: its name, for errors.
        max_seq_len: fewer tokens than theirs, which a sliding window may need.

    Raises:
        ValueError: on a key that is in no table, or a value that this library has nothing for.

    >>> fields = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=100)
    >>> ours_from_fields(fields | dict(model_type="llama", max_position_embeddings=128), "file")["norm_eps"]
    1e-06
    """
    architecture = architecture_of(fields, where)
    given = {**architecture.absent, **{key: value for key, value in fields.items() if key not in HARMLESS}}
    fixed = NEUTRAL | dict(architecture.fixed)
    known = [*FIELDS, *ROTARY, *fixed, *(WINDOW if architecture.window else ())]
    for key, value in given.items():
        if key not in known:
            raise ValueError(
                f"{where}: unknown key '{key}'{nearest(key, known)}; this library cannot tell what it does"
            )
        if key in fixed and value != fixed[key]:
            raise ValueError(f"{where}: {key}={value!r}: this library has only {fixed[key]!r}")
    missing = [key for key in FIELDS if key not in given]
    if missing:
        raise ValueError(f"{where}: has no '{missing[0]}'")
    ours = {our: given[their] for their, our in FIELDS.items()} | dict(architecture.ours)
    if max_seq_len is not None:
        _require_fewer(max_seq_len, ours["max_seq_len"], where)
        ours["max_seq_len"] = max_seq_len
    _require_no_window(given, ours["max_seq_len"], where)
    return ours | {"rope_theta": _rope_theta(given, where)}


def _require_fewer(wanted: int, theirs: Any, where: str) -> None:
    if isinstance(theirs, int) and wanted > theirs:
        raise ValueError(f"max_seq_len={wanted}: more than the max_position_embeddings={theirs} of {where}")


def _rope_theta(given: Mapping[str, Any], where: str) -> Any:
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"{where}: rope_parameters={rope!r}: expected a group of keys")
    kind = rope.get("rope_type", rope.get("type", "default"))
    share = rope.get("partial_rotary_factor", given.get("partial_rotary_factor", 1.0))
    others = set(rope) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if kind != "default" or share not in (None, 1.0) or others:
        raise ValueError(f"{where}: rotary embedding {dict(rope)}: this library has the default one of all dimensions")
    return rope.get("rope_theta", given.get("rope_theta", 10000.0))


def _require_no_window(given: Mapping[str, Any], max_seq_len: Any, where: str) -> None:
    """A window as long as the longest sequence hides nothing."""
    window = given.get("sliding_window") if given.get("use_sliding_window", True) else None
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
        raise ValueError("qkv_bias=True and qk_norm=True: no architecture of transformers has both and is a Llama else")
    architecture = ARCHITECTURES[kind]
    fields = {
        "architectures": [architecture.model_class],
        "model_type": kind,
        **{their: getattr(config, our) for their, our in FIELDS.items()},
        **architecture.fixed,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,  # where versions of transformers before 5 and other programs look for it
    }
    return kind, fields | ({"use_sliding_window": False} if architecture.window else {})
