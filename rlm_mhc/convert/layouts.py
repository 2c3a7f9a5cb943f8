"""Llama and what differs from it by a table: weights by the names that transformers gives them.

A name that is in no table is refused: what it stands for would be lost without a word.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

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
DERIVED = "rotary_emb.inv_freq"


class Architecture(NamedTuple):
    """One model class of transformers.

    - `weights`: their names, `#` being a layer's number, and ours
    - `ours`: fields of `ModelConfig` that the class alone decides
    - `absent`: what transformers takes for a key that `config.json` lacks
    - `fixed`: keys with the one value that this library has, which is transformers' default
    """

    model_class: str
    weights: Mapping[str, str]
    ours: Mapping[str, Any]
    absent: Mapping[str, Any]
    fixed: Mapping[str, Any]


ABSENT = {"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
FIXED = {"hidden_act": "silu", "attention_dropout": 0.0}
UNBIASED = {"attention_bias": False}

ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", WEIGHTS, {}, ABSENT, FIXED | UNBIASED | {"mlp_bias": False}),
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
        if pattern.endswith(DERIVED):
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
