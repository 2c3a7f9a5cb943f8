"""A model on disk: its shape, and its weights in one safetensors file or several, keys being the dotted names of the
tree."""

import os
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rlm_mhc.checkpoint.config_files import load_config, quantization, read_json, write_config_files
from rlm_mhc.checkpoint.tensors import read_tensors, write_tensors
from rlm_mhc.config import ModelConfig
from rlm_mhc.disk import replace_file
from rlm_mhc.params import LMParams, matrix_dtype, weight_table
from rlm_mhc.tree import from_named, named_leaves

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
LARGEST_INDEX_BYTES = 1 << 26
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES_SHOWN = 3
MODULE_PREFIX = "model."


def save_pretrained(path: str | os.PathLike, params: LMParams, config: ModelConfig) -> None:
    """Write `config.json`, `config.yaml` and `model.safetensors` into the folder `path`, made if it is missing.

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
    write_config_files(folder, config, dtype_name(matrix_dtype(named, config)))
    replace_file(folder / WEIGHTS_FILE, lambda file: write_tensors(file, named))
    (folder / INDEX_FILE).unlink(missing_ok=True)


def load_pretrained(
    path: str | os.PathLike, *, device: torch.device | str = "cpu", verify: bool = True
) -> tuple[LMParams, ModelConfig]:
    """Read what `save_pretrained` wrote, this one or `RLMModel`'s: `(params, config)`, bit-equal, in the dtypes of the
    files.

    Args:
        path: the folder.
        device: where the weights go; on `meta` they are read and verified but not kept.
        verify: compare the weights with their checksums, about 3 GB/s; without it a damaged byte goes unnoticed.

    Raises:
        FileNotFoundError: when the folder or a file of it is missing.
        ValueError: on a damaged file, or one that does not fit its config; the message names the first difference. On
            quantised weights, which no function of `fn` takes.
    """
    folder = Path(path)
    config = load_config(folder)
    require_unquantised(folder)
    return from_named(weight_table(config), read_weights(folder, config, device, verify=verify)), config


def require_unquantised(folder: Path) -> None:
    """Refuse quantised weights, which no function of `fn` takes.

    Raises:
        ValueError: naming the method.
    """
    if (how := quantization(folder)) is not None:
        method = how.get("quant_method") if isinstance(how, dict) else how
        raise ValueError(
            f"{folder}: its weights are quantised ({method}); load it by RLMModel.from_pretrained, or save what that "
            "model's dequantize() returns"
        )


def read_weights(
    folder: Path,
    config: ModelConfig,
    device: torch.device | str = "cpu",
    *,
    verify: bool = True,
    optional: Container[str] = (),
) -> dict[str, Tensor]:
    """Return a folder's tensors by name, which are the weights of `config`; `optional` names are not checked.

    The prefix with which transformers writes names under `save_original_format=False` is removed.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: on a damaged file, or one that does not fit `config`; the message names the first difference.
    """
    named = read_files(folder, device, verify=verify)
    source = WEIGHTS_FILE if (folder / WEIGHTS_FILE).is_file() else INDEX_FILE
    _require_weights(named, config, str(folder / source), optional)
    return named


def read_files(folder: Path, device: torch.device | str = "cpu", *, verify: bool = True) -> dict[str, Tensor]:
    """Return all tensors of a folder by name, whatever its config.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: on a damaged file, or one that does not hold what the index says.
    """
    named: dict[str, Tensor] = {}
    for file, expected in weight_files(folder).items():
        tensors = read_tensors(file, device, verify=verify)
        if expected is not None:
            require_names(tensors, expected, f"{file}: does not fit {INDEX_FILE}")
        named |= {name.removeprefix(MODULE_PREFIX): tensor for name, tensor in tensors.items()}
    return named


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The files with a checkpoint's weights, and where there is an index, the names that it says are in each.

    Raises:
        FileNotFoundError: when one is missing.
        ValueError: when the index is none.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return {folder / WEIGHTS_FILE: None}
    index = folder / INDEX_FILE
    if not index.is_file():
        raise FileNotFoundError(f"{folder}: not a checkpoint, it has no {WEIGHTS_FILE}")
    places = read_json(index, LARGEST_INDEX_BYTES).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(x, str) and Path(x).name == x for x in places.values()):
        raise ValueError(f"{index}: expected a 'weight_map' from names to files beside it")
    files = {folder / file: {name for name, place in places.items() if place == file} for file in set(places.values())}
    missing = sorted(file.name for file in files if not file.is_file())
    if missing:
        raise FileNotFoundError(f"{folder}: damaged, {INDEX_FILE} names missing files: {abbreviate(missing)}")
    return dict(sorted(files.items()))


def require_names(named: Iterable[str], expected: Iterable[str], what: str) -> None:
    """Refuse other names than expected.

    Raises:
        ValueError: with the first few that are missing, and that are not expected.
    """
    have, want = dict.fromkeys(named), dict.fromkeys(expected)
    missing, unexpected = [name for name in want if name not in have], [name for name in have if name not in want]
    if missing or unexpected:
        raise ValueError(f"{what}; missing {abbreviate(missing)}, unexpected {abbreviate(unexpected)}")


def require_fit(named: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse tensors that are others than wanted: names, shapes, or a dtype that is no floating-point one.

    Raises:
        ValueError: with the kind of the first difference and the first few names it concerns.
    """
    require_names(named, shapes, f"{where}: does not fit its config")
    wrong = [f"{k} has {tuple(named[k].shape)}, not {shape}" for k, shape in shapes.items() if named[k].shape != shape]
    if wrong:
        raise ValueError(f"{where}: shapes do not fit its config: {abbreviate(wrong)}")
    wrong = [f"{k} is {named[k].dtype}" for k in shapes if named[k].dtype not in DTYPES]
    if wrong:
        raise ValueError(f"{where}: dtypes are not floating-point ones of 16 to 64 bits: {abbreviate(wrong)}")


def _require_weights(
    named: Mapping[str, Tensor], config: ModelConfig, where: str, optional: Container[str] = ()
) -> None:
    shapes = {name: spec.shape for name, spec in named_leaves(weight_table(config)).items() if name not in optional}
    require_fit({name: tensor for name, tensor in named.items() if name not in optional}, shapes, where)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as `config.json` has it.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def abbreviate(words: list[str]) -> str:
    """The first few words, and how many more there are.

    >>> abbreviate(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    more = f" and {len(words) - NAMES_SHOWN} more" if len(words) > NAMES_SHOWN else ""
    return ", ".join(words[:NAMES_SHOWN]) + more if words else "nothing"
