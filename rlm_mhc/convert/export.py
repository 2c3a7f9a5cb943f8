"""mHC models whose hyper-connections do nothing as the Llama, Qwen2 or Qwen3 that they are."""

import json
import os
from pathlib import Path
from typing import Any

from rlm_mhc.checkpoint.config_files import CONFIG_FILE, load_config, special_tokens
from rlm_mhc.checkpoint.shards import SHARD_BYTES, write_shards
from rlm_mhc.checkpoint.weights import dtype_name, require_fit, require_unquantised
from rlm_mhc.config import ModelConfig
from rlm_mhc.convert.fields import theirs_from_config
from rlm_mhc.convert.layouts import ARCHITECTURES, theirs_from_names
from rlm_mhc.convert.plain import require_plain
from rlm_mhc.convert.source import (
    Source,
    folder_source,
    held_tensors,
    renamed,
)
from rlm_mhc.disk import new_folder
from rlm_mhc.params import LMParams, matrix_dtype, weight_table
from rlm_mhc.tree import named_leaves


def to_llama(
    params_or_dir: Any,
    output: str | os.PathLike,
    *,
    config: ModelConfig | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write a model without open gates as transformers knows it, of the same logits to 1e-5 of the largest.

    That is any model with `mhc_enabled=False`, and an mHC model whose hyper-connections are plain residuals, as those
    of `from_llama` are before training, or with `alpha = 0` those of `fn.init`: `rlm_mhc.convert.plain.require_plain`
    says exactly. Weights stay bit-equal. `qkv_bias` makes it a Qwen2, `qk_norm` a Qwen3. The logits are those of the
    model in fp32.

    Args:
        params_or_dir: a folder with a checkpoint, or a parameter tree.
        output: the folder to write, missing or empty.
        config: the tree's; a folder has its own.
        shard_bytes: as of `upcycle`.

    Returns:
        its architecture: `llama`, `qwen2` or `qwen3`.

    Raises:
        FileNotFoundError: when the folder or a file of it is missing.
        ValueError: when gates are open, naming the first weight and by how much; on a damaged file; when there is
            something in `output`.
        OSError: when it cannot be written; nothing of it is left then.

    >>> import tempfile; from rlm_mhc import fn
    >>> config = ModelConfig.preset("tiny").replace(mhc_enabled=False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     to_llama(fn.init(config), f"{folder}/llama", config=config)
    'llama'
    """
    config, source = _checkpoint(params_or_dir, config)
    kind, fields = theirs_from_config(config)
    require_plain(source.read, config)
    plain = named_leaves(weight_table(config.replace(mhc_enabled=False)))
    theirs = theirs_from_names(plain, ARCHITECTURES[kind])
    described = {their: source.described[our] for our, their in theirs.items()}
    read = renamed(source.read, {their: our for our, their in theirs.items()})
    fields |= {"dtype": dtype_name(matrix_dtype(source.described, config)), **special_tokens(source.fields)}

    def fill(folder: Path) -> None:
        source.accompany(folder)
        write_shards(folder, described, read, shard_bytes)
        (folder / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    new_folder(Path(output), fill)
    return kind


def _checkpoint(params_or_dir: Any, config: ModelConfig | None) -> tuple[ModelConfig, Source]:
    if (config is None) == isinstance(params_or_dir, LMParams):
        raise ValueError("config: a parameter tree needs one, and a folder has its own")
    if config is None:
        folder = Path(params_or_dir)
        config = load_config(folder)
        require_unquantised(folder)
        source = folder_source(folder)
    else:
        source = Source({}, *held_tensors(named_leaves(params_or_dir)), "the tree", lambda output: None)
    shapes = {name: spec.shape for name, spec in named_leaves(weight_table(config)).items()}
    require_fit(source.described, shapes, source.where)
    return config, source
