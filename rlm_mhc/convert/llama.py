"""Llama, Mistral, Qwen2 and Qwen3 as mHC models of the same logits."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlm_mhc.checkpoint.config_files import special_tokens, write_config_files
from rlm_mhc.checkpoint.shards import SHARD_BYTES, Read, write_shards
from rlm_mhc.checkpoint.weights import dtype_name, require_fit
from rlm_mhc.config import ModelConfig
from rlm_mhc.convert.fields import ours_from_fields, unknown_keys
from rlm_mhc.convert.gates import closed_specs
from rlm_mhc.convert.layouts import Architecture, architecture_of, ours_from_names, theirs_from_names
from rlm_mhc.convert.plain import require_plain_start
from rlm_mhc.convert.source import Source, renamed, sampling_options, source_of
from rlm_mhc.disk import new_folder
from rlm_mhc.params import LMParams, matrix_dtype, weight_table
from rlm_mhc.params import names as weight_names
from rlm_mhc.tree import from_named, named_leaves
from rlm_mhc.validation import nearest

CHOICES = ("mhc_enabled", "mhc_flows", "mhc_preset", "mhc_projection", "mhc_sinkhorn_iters", "max_seq_len")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def from_llama(model_or_dir: Any, *, seed: int = 0, **choices: Any) -> tuple[LMParams, ModelConfig]:
    """`(params, config)` of an mHC model whose logits equal the source's to 1e-5 of the largest, ready to be trained.

    Weights keep their dtypes; mHC weights are new, in fp32 (fp64 beside fp64), and such that all of them receive
    gradients from the first step on (`rlm_mhc.convert.gates.closed_specs` derives how). The logits are equal in the
    arithmetic of fp32; in bf16 they are as near as two orders of the same sums.

    Args:
        model_or_dir: a `LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2ForCausalLM` or `Qwen3ForCausalLM`; a folder
            that its `save_pretrained` wrote, in one file or several; or a GGUF file of one, which is dequantised to
            fp32 and held whole in memory (it takes the packages `gguf` and `accelerate`).
        seed: of the noise in `phi`.
        **choices: fields of `ModelConfig` that the source leaves open: `mhc_enabled`, `mhc_flows`, `mhc_preset`,
            `mhc_projection`, `mhc_sinkhorn_iters`, and `max_seq_len`, at most what it has.

    Returns:
        Tensors of their own, on the CPU.

    Raises:
        FileNotFoundError: when the folder or a file of it is missing.
        ValueError: on another architecture, a weight that its table does not have, a key of `config.json` that
            transformers' config class knows and this library has no value for (scaled rotary embedding, a sliding
            window, biases of the output projection), a damaged file, pickled weights, a GGUF file without the
            packages that read it, or a choice with which no weights give these logits.

    Warns:
        UserWarning: naming keys of `config.json` that the config class does not know, and which have no effect.

    Source: the layout of transformers 5; equality in `tests/convert/test_llama.py`.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> theirs = LlamaForCausalLM(LlamaConfig(
    ...     hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=10))
    >>> params, config = from_llama(theirs)
    >>> from rlm_mhc import fn
    >>> tokens = torch.tensor([[1, 2, 3]])
    >>> torch.allclose(fn.forward(params, tokens, config), theirs(tokens).logits, atol=1e-6)
    True
    """
    config, described, read = _upcycled(source_of(model_or_dir), seed, choices)
    return from_named(weight_table(config), read(list(described))), config


def upcycle(
    model_or_dir: Any,
    output: str | os.PathLike,
    *,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    **choices: Any,
) -> ModelConfig:
    """`from_llama` from a folder to a folder, which `load_pretrained`, `RLMModel.from_pretrained` and recipes read.

    Weights go through memory one output file, of `shard_bytes`, at a time. Tokenizer and generation config are copied.
    The folder is there, whole, when all of it is written.

    Args:
        model_or_dir: as of `from_llama`.
        output: the folder to write, missing or empty.
        seed: as of `from_llama`.
        shard_bytes: the most that the weights of one file take; a larger weight has a file of its own.
        **choices: as of `from_llama`.

    Raises:
        FileNotFoundError: as `from_llama`.
        ValueError: as `from_llama`, and when there is something in `output`.
        OSError: when it cannot be written; nothing of it is left then.

    >>> import tempfile; from transformers import LlamaConfig, LlamaForCausalLM
    >>> theirs = LlamaForCausalLM(LlamaConfig(
    ...     hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=10))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     theirs.save_pretrained(folder)
    ...     config = upcycle(folder, f"{folder}/mhc", mhc_flows=2)
    >>> config.mhc_flows
    2
    """
    source = source_of(model_or_dir)
    config, described, read = _upcycled(source, seed, choices)

    def fill(folder: Path) -> None:
        source.accompany(folder)
        write_shards(folder, described, read, shard_bytes)
        write_config_files(folder, config, dtype_name(matrix_dtype(described, config)), special_tokens(source.fields))

    new_folder(Path(output), fill)
    return config


def _upcycled(source: Source, seed: int, choices: Mapping[str, Any]) -> tuple[ModelConfig, dict[str, Tensor], Read]:
    """The config, every weight on the meta device under our names and in our order, and `read(names)` for some."""
    architecture = architecture_of(source.fields, source.where)
    config = _config(source, choices)
    require_plain_start(config)
    origin = _origin(source, architecture, config)
    taken = {ours: source.described[theirs] for ours, theirs in origin.items()}
    specs, compute = closed_specs(config), matrix_dtype(taken, config)
    described = {
        name: specs[name].init(name, seed, "meta", compute) if name in specs else taken[name]
        for name in weight_names(config)
    }
    read_theirs = renamed(source.read, origin)

    def read(names: list[str]) -> dict[str, Tensor]:
        found = read_theirs([name for name in names if name in origin])
        return {n: found[n] if n in origin else specs[n].init(n, seed, "cpu", compute) for n in names}

    return config, described, read


def _config(source: Source, choices: Mapping[str, Any]) -> ModelConfig:
    for name in choices:
        if name not in CHOICES:
            raise ValueError(f"unknown choice '{name}'{nearest(name, CHOICES)}; known are {', '.join(CHOICES)}")
    fields = ours_from_fields(source.fields, source.where, choices.get("max_seq_len"))
    _name_unknown(source)
    chosen = {name: value for name, value in choices.items() if name != "max_seq_len"}
    try:
        return ModelConfig(**fields, **chosen)
    except ValueError as error:
        raise ValueError(f"{source.where}: {error}") from None


def _name_unknown(source: Source) -> None:
    carried = sampling_options(source.fields)
    if unknown := [key for key in unknown_keys(source.fields) if key not in carried]:
        kind = architecture_of(source.fields, source.where).model_class
        warnings.warn(
            f"{source.where}: keys of config.json without effect, as {kind} does not know them: {', '.join(unknown)}",
            stacklevel=5,  # the line that called from_llama or upcycle
        )


def _origin(source: Source, architecture: Architecture, config: ModelConfig) -> dict[str, str]:
    """Their name for each of our weights that they have.

    Raises:
        ValueError: on other names, shapes or dtypes than the config's.
    """
    ours = ours_from_names(source.described, architecture, source.where)
    if config.tie_embeddings and HEAD in ours:
        _require_equal(source, HEAD, EMBEDDING)
        del ours[HEAD]
    plain = named_leaves(weight_table(config.replace(mhc_enabled=False)))
    theirs = theirs_from_names(plain, architecture)
    shapes = {theirs[name]: spec.shape for name, spec in plain.items()}
    require_fit({name: source.described[name] for name in ours}, shapes, source.where)
    return {our: their for their, our in ours.items()}


def _require_equal(source: Source, name: str, other: str) -> None:
    """A tied weight may be written twice, but must then be one."""
    both = source.read([name, other]) if other in source.described else {}
    if not both or not torch.equal(both[name], both[other]):
        raise ValueError(f"{source.where}: tie_word_embeddings is true, but {name} is not {other}; set it to false")
