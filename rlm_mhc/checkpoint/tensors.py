"""Safetensors files with a checksum per tensor in their metadata: the format itself has none, and a changed byte
would load silently."""

import json
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlm_mhc.disk import CHECKSUM, replace_file

HASHING_THREADS = 4


def write_tensors(file: Path, named: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors, with the checksums of all beside other metadata; equal tensors give equal files.

    Raises:
        OSError: when it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        checksums = dict(zip(on_cpu, pool.map(_digest, on_cpu.values()), strict=True))
    try:
        save_file(on_cpu, file, metadata={"format": "pt", **(metadata or {}), CHECKSUM: json.dumps(checksums)})
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(f"{file}: cannot be written ({' '.join(str(error).split())[:200]})") from None
    _sort_metadata(file)


def read_tensors(
    file: Path, device: torch.device | str = "cpu", *, verify: bool = True, names: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """The tensors of a file, in memory of their own; with `verify`, compared with their checksums where it has any.

    With `names` those alone, in that order: no other is read. On `meta` without `verify` none is, only described.

    Raises:
        ValueError: when the file is none of the format, or damaged, naming the first tensor that is.
    """
    from safetensors import SafetensorError, safe_open

    def read(name: str) -> tuple[Tensor, str]:
        tensor = content.get_tensor(name)
        # A copy: what is mapped would change, or fault, with the file.
        return tensor.to(device, copy=True), _digest(tensor) if verify else ""

    try:
        with safe_open(file, "pt") as content, ThreadPoolExecutor(HASHING_THREADS) as pool:
            wanted, metadata = list(content.keys() if names is None else names), content.metadata() or {}
            # The allocator keeps for a thread what the thread has freed: one tensor is read by this one.
            apply = pool.map if len(wanted) > 1 else map
            rows = dict(zip(wanted, apply(read, wanted), strict=True))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: damaged or not a safetensors file ({error})") from None
    if verify and CHECKSUM in metadata:
        expected = _checksums(metadata[CHECKSUM], file)
        promised = expected if names is None else {}
        damaged = [name for name in {**rows, **promised} if name not in rows or rows[name][1] != expected.get(name)]
        if damaged:
            others = f" nor are {len(damaged) - 1} other tensors;" if damaged[1:] else ""
            raise ValueError(
                f"{file}: damaged, {damaged[0]} is not what was written;{others} take another copy, "
                "or read it as it is with verify=False"
            )
    return {name: tensor for name, (tensor, _) in rows.items()}


def add_checksums(file: Path) -> None:
    """Give a file that another library wrote the checksums of its tensors.

    Raises:
        ValueError: when it is no safetensors file.
        OSError: when it cannot be written; it is as it was then.
    """
    from safetensors import safe_open

    named = read_tensors(file, verify=False)
    with safe_open(file, "pt") as content:
        metadata = content.metadata() or {}
    replace_file(file, lambda path: write_tensors(path, named, metadata))


def _checksums(text: str, file: Path) -> dict[str, str]:
    try:
        checksums = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: damaged, its checksums cannot be read ({error})") from None
    if not isinstance(checksums, dict):
        raise ValueError(f"{file}: damaged, its checksums are a {type(checksums).__name__}")
    return checksums


def _digest(tensor: Tensor) -> str:
    import xxhash

    digest = xxhash.xxh3_128(f"{tensor.dtype} {list(tensor.shape)}".encode())
    if tensor.numel():
        # One entry counts as contiguous with any stride, but cannot be viewed as bytes with any.
        content: Any = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()


def _sort_metadata(file: Path) -> None:
    """Give the metadata one order: safetensors writes it in a random one."""
    with file.open("r+b") as content:
        (size,) = struct.unpack("<Q", content.read(8))
        header = json.loads(content.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size
        content.seek(8)
        content.write(text.ljust(size))
