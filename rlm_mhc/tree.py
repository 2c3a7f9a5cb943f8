"""Trees of tensors under their dotted names: `layers.3.attn_mhc.phi` is the field path and the file key alike."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree = TypeVar("Tree")

tree_leaves = pytree.tree_leaves
tree_map = pytree.tree_map
tree_flatten = pytree.tree_flatten
tree_unflatten = pytree.tree_unflatten


def named_leaves(tree: Any) -> dict[str, Any]:
    """Dotted name → leaf, in tree order; an absent weight is `()` and has no name.

    >>> from rlm_mhc.params import MHCParams
    >>> list(named_leaves((MHCParams(1, 2, 3),)))
    ['0.phi', '0.alpha', '0.bias']
    """
    paths, _ = pytree.tree_flatten_with_path(tree)
    return {".".join(_step(key) for key in path): leaf for path, leaf in paths}


def map_named(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Any:
    """`f(name, leaf, *leaves of rest)` over a tree, in the same structure."""
    leaves, spec = tree_flatten(tree)
    others = [spec.flatten_up_to(other) for other in rest]
    names = named_leaves(tree)
    return tree_unflatten([f(*row) for row in zip(names, leaves, *others, strict=True)], spec)


def from_named(example: Tree, named: Mapping[str, Any]) -> Tree:
    """The tree of `example`'s structure whose leaves are taken from `named`.

    Raises:
        KeyError: on a name of the structure that `named` lacks.
    """
    return map_named(lambda name, _: named[name], example)


def size_bytes(tree: Any) -> int:
    """Bytes of all tensors of a tree (also on the meta device).

    >>> size_bytes((torch.zeros(3), torch.zeros(2, dtype=torch.int64)))
    28
    """
    return sum(x.numel() * x.element_size() for x in tree_leaves(tree) if isinstance(x, Tensor))


def size(tree: Any) -> int:
    """The number of entries of all tensors of a tree.

    >>> size((torch.zeros(3), torch.zeros(2, 2)))
    7
    """
    return sum(leaf.numel() for leaf in tree_leaves(tree))


def ravel(tree: Any) -> Tensor:
    """All leaves of a tree as one vector, in tree order.

    >>> ravel((torch.ones(2), torch.zeros(1, 2)))
    tensor([1., 1., 0., 0.])
    """
    return torch.cat([leaf.reshape(-1) for leaf in tree_leaves(tree)])


def unravel(vector: Tensor, example: Tree) -> Tree:
    """Views of a vector in the structure, shapes and order of `example`; the inverse of `ravel`."""
    leaves, spec = tree_flatten(example)
    parts = vector.split([leaf.numel() for leaf in leaves])
    return tree_unflatten([part.view(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)], spec)


def _step(key: Any) -> str:
    return str(key.idx) if isinstance(key, pytree.SequenceKey) else str(getattr(key, "name", getattr(key, "key", key)))
