"""Ranks that differ in config, code or weights would train without an error, and wrongly: refused at the start."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlm_mhc.parallel.ranks import Ranks, gather
from rlm_mhc.tree import tree_leaves

WORDS_AT_ONCE = 1 << 24


def require_agreement(ranks: Ranks, find: Callable[[], dict[str, Any]]) -> None:
    """Compare named facts, the same names on every rank, with those of rank 0; alone, they are not even found out.

    Raises:
        ValueError: on every rank, naming the first rank that differs and in what.
    """
    if ranks.world == 1:
        return
    gathered = gather(ranks, find())
    for rank, theirs in enumerate(gathered):
        for name, value in gathered[0].items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"rank {rank} differs from rank 0 in {name} ({theirs.get(name)} against {value}); "
                    "start every rank from the same code, config and files"
                )


def checksum(tree: Any) -> str:
    """A digest of all tensors of a tree: equal trees have equal ones, on any device.

    >>> checksum((torch.zeros(3),)) == checksum((torch.zeros(3),)), checksum((torch.ones(3),)) == checksum(())
    (True, False)
    """
    digest = hashlib.sha256()
    for leaf in tree_leaves(tree):
        digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
        bits = leaf.detach().reshape(-1).view(torch.uint8)
        if bits.storage_offset() % 4:  # a view of 16-bit numbers may begin between two words
            bits = bits.clone()
        words = bits.view(torch.int32) if bits.numel() % 4 == 0 else bits
        for part in words.split(WORDS_AT_ONCE):
            position = torch.arange(1, len(part) + 1, dtype=torch.int64, device=part.device)
            digest.update(f"{(part * position).sum().item()}".encode())
    return digest.hexdigest()[:16]


@functools.cache
def code_version() -> str:
    """A digest of this package's sources and the version of torch."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".cpp")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
