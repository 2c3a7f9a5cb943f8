"""Norms of trees and gradient clipping."""

import functools
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from rlm_mhc.fn.layout import packed
from rlm_mhc.fn.norm import widen
from rlm_mhc.tree import tree_leaves, tree_map
from rlm_mhc.types import Scalar

Tree = TypeVar("Tree")
# A running sum in fp32 of more squares than this may be off by more than 1e-6: all roundings can go the same way. The
# sums of pieces are added up in fp64.
PIECE = 512
# Entries of a narrow dtype that are widened at once, so that the copy stays in the cache.
WIDENED_AT_ONCE = 1 << 20


def leaf_norms(tree: Any) -> Float[Tensor, "leaves"]:
    """`sqrt(Σ x²)` of each leaf, in tree order, in fp32 or wider, to a relative error below 1e-6.

    >>> leaf_norms((torch.tensor([3.0, 4.0]), torch.tensor([2.0])))
    tensor([5., 2.])
    """
    leaves = tree_leaves(tree)
    if not leaves:
        return torch.zeros(0, dtype=torch.float32, device="cpu")
    wide = torch.promote_types(functools.reduce(torch.promote_types, {leaf.dtype for leaf in leaves}), torch.float32)
    if {(leaf.is_cuda, leaf.dtype) for leaf in leaves} == {(True, leaves[0].dtype)}:
        # One launch for all; blocks of threads sum small pieces there.
        return torch.stack(torch._foreach_norm(leaves, 2, wide))
    pieces = [_piece_norms(leaf) for leaf in leaves]
    squares = torch.cat([norm for own in pieces for norm in own]).double().square()
    counts = torch.tensor([sum(map(len, own)) for own in pieces], dtype=torch.int64, device=squares.device)
    places = torch.repeat_interleave(counts, output_size=len(squares))
    sums = squares.new_zeros(len(leaves)).index_add(0, places, squares)
    return torch.where(sums > 0, torch.where(sums > 0, sums, 1.0).sqrt(), sums).to(wide)


def _piece_norms(x: Tensor) -> list[Tensor]:
    """Return the norms of consecutive pieces of `PIECE` entries.

    Entries must be adjacent: torch adds up strided ones one after the other, in an order that rounds worse.
    """
    x = packed(x)
    if torch.promote_types(x.dtype, torch.float32) != x.dtype:
        return [norm for chunk in x.reshape(-1).split(WIDENED_AT_ONCE) for norm in _piece_norms(widen(chunk))]
    whole = x.numel() // PIECE * PIECE
    if whole == x.numel():
        return [torch.linalg.vector_norm(x.reshape(-1, PIECE), dim=-1)]
    flat = x.reshape(-1)
    rest = torch.linalg.vector_norm(flat[whole:], keepdim=True)
    return [torch.linalg.vector_norm(flat[:whole].view(-1, PIECE), dim=-1), rest] if whole else [rest]


def global_norm(tree: Any) -> Scalar:
    """`sqrt(Σ x²)` over all leaves, in fp32 or wider; 0 where there are none.

    >>> global_norm((torch.tensor([3.0]), torch.tensor([4.0])))
    tensor(5.)
    """
    return torch.linalg.vector_norm(leaf_norms(tree))


def clip_by_global_norm(grads: Tree, max_norm: float) -> tuple[Tree, Scalar]:
    """Scale all gradients by `min(1, max_norm / norm)`, in their dtypes; also returns the norm before clipping.

    Raises:
        ValueError: unless `max_norm > 0`.

    >>> clip_by_global_norm((torch.tensor([3.0, 4.0]),), 1.0)
    ((tensor([0.6000, 0.8000]),), tensor(5.))
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm}: expected a number above 0")
    norm = global_norm(grads)
    scale = max_norm / norm.clamp(min=max_norm)
    return tree_map(lambda g: (g * scale).to(g.dtype), grads), norm
