"""Trees of tensors under their dotted names: `layers.3.attn_mhc.phi` is the field path and the file key alike.

A tree is nested tuples, NamedTuples, lists and mappings, as for torch's own pytrees, which take these trees as they
are; walking them here costs a tenth of it, and a step walks its parameters a dozen times. An absent weight is `()`.
Several trees are paired as by `torch.utils._pytree`: sequences by position, mappings by key, in the order of the first
tree; other structures are errors.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, TypeVar

import torch
from torch import Tensor

Tree = TypeVar("Tree")
# Most leaves are of these types: the walks below take no call for them.
ATOMS = (Tensor, bool, str, int, float)


def tree_leaves(tree: Any) -> list[Any]:
    """All leaves, in order.

    >>> tree_leaves((1, {"a": 2, "b": [3, ()]}))
    [1, 2, 3]
    """
    leaves: list[Any] = []
    _collect(tree, leaves)
    return leaves


def tree_map(f: Callable[..., Any], tree: Tree, *rest: Any) -> Any:
    """`f(leaf, *leaves of rest)` over trees of one structure, in that structure; mappings are paired by key.

    Raises:
        ValueError: naming the first place where the structures differ.

    >>> tree_map(lambda a, b: a - b, {"a": 1, "b": 2}, {"b": 20, "a": 10})
    {'a': -9, 'b': -18}
    """
    if not rest:
        return _map(f, tree)
    try:
        return _map(f, tree, *rest)
    except _StructureError:
        differences = (_difference(tree, other, "") for other in rest)
        raise ValueError(f"trees of different structure: {next(filter(None, differences))}") from None


def tree_rows(tree: Any, *rest: Any) -> list[tuple[Any, ...]]:
    """Return for each leaf the tuple of corresponding leaves of all trees: the arguments of `tree_map`'s function.

    Raises:
        ValueError: as `tree_map`.

    >>> tree_rows((1, {"a": 2}), (3, {"a": 4}))
    [(1, 3), (2, 4)]
    """
    rows: list[tuple[Any, ...]] = []
    tree_map(lambda *row: rows.append(row), tree, *rest)
    return rows


def rebuild(example: Tree, leaves: Iterator[Any]) -> Tree:
    """The tree of `example`'s structure that holds the next leaves of an iterator; a mapping keeps its type.

    Raises:
        ValueError: when there are too few leaves.

    >>> rebuild((0, [0, ()]), iter([1, 2]))
    (1, [2, ()])
    """
    try:
        return _map(lambda _: next(leaves), example)
    except StopIteration:
        raise ValueError(f"fewer leaves than the {len(tree_leaves(example))} of the structure") from None


def named_leaves(tree: Any) -> dict[str, Any]:
    """Dotted name → leaf, in tree order; an absent weight is `()` and has no name.

    Raises:
        ValueError: when two leaves have one name, as in `{"a.b": 1, "a": {"b": 2}}`.

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


class _StructureError(Exception):
    pass


def _is_sequence(tree: Any) -> bool:
    kind = type(tree)
    return kind is tuple or kind is list or (hasattr(kind, "_fields") and isinstance(tree, tuple))


def _is_mapping(tree: Any) -> bool:
    # The check against the abstract class costs several times the look for `keys`, which most leaves lack.
    kind = type(tree)
    return kind is dict or (hasattr(kind, "keys") and isinstance(tree, Mapping))


def _collect(tree: Any, into: list[Any]) -> None:
    kind = type(tree)
    if kind is tuple or kind is list or (hasattr(kind, "_fields") and isinstance(tree, tuple)):
        children = tree
    elif _is_mapping(tree):
        children = tree.values()
    else:
        into.append(tree)
        return
    for child in children:
        if isinstance(child, ATOMS):
            into.append(child)
        else:
            _collect(child, into)


def _map(f: Callable[..., Any], example: Any, *rest: Any) -> Any:
    """`f` over the leaves of trees, which share the structure of the first."""
    kind = type(example)
    if kind is tuple or kind is list or (hasattr(kind, "_fields") and isinstance(example, tuple)):
        for other in rest:
            if type(other) is not kind or len(other) != len(example):
                raise _StructureError
        rows: Any = zip(example, *rest)  # noqa: B905, which would check lengths again
    elif _is_mapping(example):
        for other in rest:
            if not _is_mapping(other) or other.keys() != example.keys():
                raise _StructureError
        rows = [(child, *(other[key] for other in rest)) for key, child in example.items()]
    else:
        for other in rest:
            if _is_sequence(other) or _is_mapping(other):
                raise _StructureError
        return f(example, *rest)
    children = []
    for row in rows:
        for child in row:
            if not isinstance(child, ATOMS):
                children.append(_map(f, *row))
                break
        else:
            children.append(f(*row))
    return children if kind is list else tuple(children) if kind is tuple else _filled(example, children)


def _filled(example: Any, children: list[Any]) -> Any:
    """The node of the kind of `example` that holds these children."""
    kind = type(example)
    if isinstance(example, tuple):
        return kind(*children)
    items = dict(zip(example, children, strict=True))
    if kind is dict:
        return items
    if not isinstance(example, MutableMapping):
        return kind(items)
    filled = copy.copy(example)  # with what else it holds, such as the factory of a defaultdict
    for key, child in items.items():
        filled[key] = child
    return filled


def _difference(example: Any, tree: Any, name: str) -> str | None:
    """Describe the first place where the structures differ; None where they are equal."""
    place = repr(name[:-1]) if name else "the root"
    mappings = _is_mapping(example) and _is_mapping(tree)
    alike = mappings or (_is_sequence(example) and type(tree) is type(example))
    if not alike:
        expected, other = (type(x).__name__ if _is_sequence(x) or _is_mapping(x) else "" for x in (example, tree))
        return f"{place} is {other or 'a leaf'}, expected {expected or 'a leaf'}" if expected or other else None
    if mappings and tree.keys() != example.keys():
        missing, unknown = (sorted(map(repr, a.keys() - b.keys())) for a, b in ((example, tree), (tree, example)))
        return f"{place} lacks the keys [{', '.join(missing)}] and has [{', '.join(unknown)}] beside those expected"
    if len(tree) != len(example):
        return f"{place} has {len(tree)} entries, expected {len(example)}"
    keys: Any = example if mappings else getattr(example, "_fields", range(len(example)))
    twins = [tree[key] for key in example] if mappings else tree
    for key, child, twin in zip(keys, example.values() if mappings else example, twins, strict=True):
        if found := _difference(child, twin, f"{name}{key}."):
            return found
    return None


def _collect_named(tree: Any, prefix: str, into: dict[str, Any]) -> None:
    kind = type(tree)
    if hasattr(kind, "_fields") and isinstance(tree, tuple):
        children: Any = zip(kind._fields, tree)  # noqa: B905, for speed
    elif kind is tuple or kind is list:
        children = enumerate(tree)
    elif _is_mapping(tree):
        children = tree.items()
    else:
        name = prefix[:-1]
        if name in into:
            raise ValueError(f"two leaves have the name {name!r}: rename one of the keys that contain a dot")
        into[name] = tree
        return
    for key, child in children:
        _collect_named(child, f"{prefix}{key}.", into)
