"""Trees of tensors under their dotted names: `layers.3.attn_mhc.phi` is the field path and the file key alike.

A tree is nested tuples, NamedTuples, lists and dicts, as for torch's own pytrees, which take these trees as they are;
walking them here costs a tenth of it, and a step walks its parameters a dozen times. An absent weight is `()`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

Tree = TypeVar("Tree")


def tree_leaves(tree: Any) -> list[Any]:
    """All leaves, in order.

    >>> tree_leaves((1, {"a": 2, "b": [3, ()]}))
    [1, 2, 3]
    """
    leaves: list[Any] = []
    _collect(tree, leaves)
    return leaves


def tree_map(f: Callable[..., Any], tree: Tree, *rest: Any) -> Any:
    """`f(leaf, *leaves of rest)` over trees of one structure, in that structure.

    Raises:
        ValueError: when the trees differ in their number of leaves.
    """
    columns = (tree_leaves(other) for other in (tree, *rest))
    return rebuild(tree, (f(*row) for row in zip(*columns, strict=True)))


def rebuild(example: Tree, leaves: Iterator[Any]) -> Tree:
    """The tree of `example`'s structure that holds the next leaves of an iterator.

    >>> rebuild((0, [0, ()]), iter([1, 2]))
    (1, [2, ()])
    """
    kind: Any = type(example)
    if kind is tuple:
        return tuple(rebuild(child, leaves) for child in example)  # type: ignore[attr-defined,return-value]
    if hasattr(kind, "_fields"):
        return kind(*(rebuild(child, leaves) for child in example))  # type: ignore[attr-defined]
    if kind is list:
        return [rebuild(child, leaves) for child in example]  # type: ignore[attr-defined,return-value]
    if kind is dict:
        return {key: rebuild(child, leaves) for key, child in example.items()}  # type: ignore[attr-defined,return-value]
    return next(leaves)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Dotted name → leaf, in tree order; an absent weight is `()` and has no name.

    >>> from rlm_mhc.params import MHCParams
    >>> list(named_leaves((MHCParams(1, 2, 3),)))
    ['0.phi', '0.alpha', '0.bias']
    """
    named: dict[str, Any] = {}
    _collect_named(tree, "", named)
    return named


def map_named(f: Callable[..., Any], tree: Tree, *rest: Any) -> Any:
    """`f(name, leaf, *leaves of rest)` over trees of one structure, in that structure."""
    return tree_map(f, rebuild(tree, iter(named_leaves(tree))), tree, *rest)


def from_named(example: Tree, named: Mapping[str, Any]) -> Tree:
    """The tree of `example`'s structure whose leaves are taken from `named`.

    Raises:
        KeyError: on a name of the structure that `named` lacks.
    """
    return rebuild(example, iter([named[name] for name in named_leaves(example)]))


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
    leaves = tree_leaves(example)
    parts = vector.split([leaf.numel() for leaf in leaves])
    return rebuild(example, (part.view(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)))


def _collect(tree: Any, into: list[Any]) -> None:
    kind: Any = type(tree)
    if kind is tuple or kind is list or hasattr(kind, "_fields"):
        for child in tree:
            _collect(child, into)
    elif kind is dict:
        for child in tree.values():
            _collect(child, into)
    else:
        into.append(tree)


def _collect_named(tree: Any, prefix: str, into: dict[str, Any]) -> None:
    kind: Any = type(tree)
    if hasattr(kind, "_fields"):
        children = zip(kind._fields, tree, strict=True)
    elif kind is tuple or kind is list:
        children = enumerate(tree)  # type: ignore[assignment]
    elif kind is dict:
        children = tree.items()
    else:
        into[prefix[:-1]] = tree
        return
    for key, child in children:
        _collect_named(child, f"{prefix}{key}.", into)
