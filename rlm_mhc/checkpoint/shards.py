"""Weights in several files of a bounded size, of which one at a time is in memory."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from rlm_mhc.checkpoint.tensors import read_tensors, write_tensors
from rlm_mhc.checkpoint.weights import INDEX_FILE, WEIGHTS_FILE, require_names, weight_files
from rlm_mhc.disk import replace_file

SHARD_BYTES = 1 << 30
Read = Callable[[list[str]], dict[str, Tensor]]


def stored_tensors(folder: Path) -> tuple[dict[str, Tensor], Read]:
    """What a folder's safetensors files hold: every tensor on the meta device, and `read(names)` for some of them.

    Those read have memory of their own, and are compared with their checksums where a file has any.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: naming the file that is damaged, or not what the index says.
    """
    described: dict[str, Tensor] = {}
    places: dict[str, Path] = {}
    for file, expected in weight_files(folder).items():
        tensors = read_tensors(file, "meta", verify=False)
        if expected is not None:
            require_names(tensors, expected, f"{file}: does not fit {INDEX_FILE}")
        described |= tensors
        places |= dict.fromkeys(tensors, file)

    def read(names: list[str]) -> dict[str, Tensor]:
        # A file is mapped anew for each tensor: what was read of a mapping counts as memory until it is closed.
        return {name: read_tensors(places[name], names=[name])[name] for name in names}

    return described, read


def write_shards(folder: Path, described: Mapping[str, Tensor], read: Read, shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors into files of at most `shard_bytes`, a larger tensor into one of its own, and their index.

    What fits one file becomes `model.safetensors` alone. Equal tensors give equal files.

    Args:
        folder: where they go.
        described: every tensor by name, in the order of the files; on the meta device.
        read: gives those of one file.
        shard_bytes: the most that a file's tensors take; that much is in memory at once, and the tensor being read.

    Raises:
        OSError: when it cannot be written.
    """
    plan = _plan(described, shard_bytes)
    if len(plan) == 1:
        replace_file(folder / WEIGHTS_FILE, lambda file: write_tensors(file, read(plan[0])))
        return
    places: dict[str, str] = {}
    for number, names in enumerate(plan, 1):
        file = folder / f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        replace_file(file, lambda path, names=names: write_tensors(path, read(names)))  # type: ignore[misc]
        places |= dict.fromkeys(names, file.name)
    index = {"metadata": {"total_size": sum(map(_bytes, described.values()))}, "weight_map": places}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    replace_file(folder / INDEX_FILE, lambda file: file.write_text(text, encoding="utf-8"))


def _plan(described: Mapping[str, Tensor], shard_bytes: int) -> list[list[str]]:
    plan: list[list[str]] = [[]]
    filled = 0
    for name, tensor in described.items():
        if plan[-1] and filled + _bytes(tensor) > shard_bytes:
            plan.append([])
            filled = 0
        plan[-1].append(name)
        filled += _bytes(tensor)
    return plan


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
