from collections import OrderedDict, UserDict, defaultdict
from types import MappingProxyType
from typing import NamedTuple

import pytest

from rlm_mhc.tree import from_named, named_leaves, rebuild, tree_leaves, tree_map, tree_rows


class Pair(NamedTuple):
    a: object
    b: object


class Other(NamedTuple):
    a: object
    b: object


def minus(x, y):
    return x - y


def test_mappings_are_paired_by_key_in_the_order_of_the_first():
    first = {"a": 10, "b": Pair({"x": 20, "y": 30}, ())}
    second = {"b": Pair({"y": 3, "x": 2}, ()), "a": 1}
    difference = tree_map(minus, first, second)
    assert difference == {"a": 9, "b": Pair({"x": 18, "y": 27}, ())}
    assert list(difference) == ["a", "b"]
    assert tree_rows(first, second, first) == [(10, 1, 10), (20, 2, 20), (30, 3, 30)]


MAPPINGS = [
    OrderedDict([("b", 1), ("a", (2, 3))]),
    MappingProxyType({"b": 1, "a": (2, 3)}),
    defaultdict(list, {"b": 1, "a": (2, 3)}),
    UserDict({"b": 1, "a": (2, 3)}),
]


@pytest.mark.parametrize("mapping", MAPPINGS, ids=lambda x: type(x).__name__)
def test_any_mapping_is_a_node_and_keeps_its_type(mapping):
    assert tree_leaves([mapping]) == [1, 2, 3]
    assert named_leaves((mapping,)) == {"0.b": 1, "0.a.0": 2, "0.a.1": 3}
    doubled = tree_map(lambda x: 2 * x, mapping)
    assert type(doubled) is type(mapping)
    assert dict(doubled) == {"b": 2, "a": (4, 6)}
    assert list(doubled) == ["b", "a"]
    assert dict(mapping) == {"b": 1, "a": (2, 3)}
    assert dict(tree_map(minus, mapping, {"a": (1, 1), "b": 1})) == {"b": 0, "a": (1, 2)}
    assert dict(from_named(mapping, {"a.0": 5, "a.1": 6, "b": 4})) == {"b": 4, "a": (5, 6)}
    if isinstance(mapping, defaultdict):
        assert doubled["new"] == []


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"a": 1, "b": 2}, {"c": 3, "d": 4}, r"the root lacks the keys \['a', 'b'\] and has \['c', 'd'\]"),
        ({"x": {"a": 1, "b": 2}}, {"x": {"a": 1}}, r"'x' lacks the keys \['b'\]"),
        ((1, (2, 3)), (1, (2, 3, 4)), "'1' has 3 entries, expected 2"),
        ([(1, 2)], [[1, 2]], "'0' is list, expected tuple"),
        (Pair(1, 2), Other(1, 2), "the root is Other, expected Pair"),
        (Pair(1, 2), (1, 2), "the root is tuple, expected Pair"),
        (Pair(1, {"k": 2}), Pair(1, {"k": (2,)}), r"'b\.k' is tuple, expected a leaf"),
        (Pair(1, (2,)), Pair(1, 2), "'b' is a leaf, expected tuple"),
        (Pair(1, ()), Pair(1, 2), "'b' is a leaf, expected tuple"),
    ],
)
def test_other_structures_are_refused_with_their_place(first, second, message):
    with pytest.raises(ValueError, match=message):
        tree_rows(first, second)
    with pytest.raises(ValueError, match=message):
        tree_map(lambda *row: row, first, first, second, first)


def test_leaves_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"two leaves have the name 'a\.b'"):
        named_leaves({"a.b": 1, "a": {"b": 2}})


def test_too_few_leaves_are_refused():
    with pytest.raises(ValueError, match="fewer leaves than the 3"):
        rebuild({"a": (1, 2), "b": 3}, iter([1, 2]))
