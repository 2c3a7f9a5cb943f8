"""Trees are walked as by torch's own pytrees."""

from collections import OrderedDict, namedtuple

from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from rlm_mhc.tree import from_named, named_leaves, rebuild, tree_leaves, tree_map

Node = namedtuple("Node", ["left", "right"])
KEYS = st.sampled_from("abcd")


def trees(leaves):
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.builds(Node, inner, inner)
            | st.dictionaries(KEYS, inner, max_size=3)
            | st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict)
        ),
        max_leaves=8,
    )


TREES = trees(st.integers())


@st.composite
def shuffled(draw, tree):
    """The tree with its mappings in any order, and other leaves."""
    if isinstance(tree, dict):
        return {key: draw(shuffled(tree[key])) for key in draw(st.permutations(list(tree)))}
    if isinstance(tree, Node):
        return Node(*(draw(shuffled(child)) for child in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(draw(shuffled(child)) for child in tree)
    return draw(st.integers())


@given(TREES)
def test_leaves_and_rebuilding_are_those_of_torch(tree):
    leaves, spec = pytree.tree_flatten(tree)
    assert tree_leaves(tree) == leaves
    assert rebuild(tree, iter(range(len(leaves)))) == pytree.tree_unflatten(range(len(leaves)), spec)
    assert from_named(tree, named_leaves(tree)) == tree


@given(st.data(), TREES)
def test_trees_that_differ_in_the_order_of_keys_are_paired_as_by_torch(data, tree):
    other, third = (data.draw(shuffled(tree)) for _ in range(2))

    def f(*row):
        return row

    ours, theirs = tree_map(f, tree, other, third), pytree.tree_map(f, tree, other, third)
    assert ours == theirs
    assert pytree.tree_structure(ours) == pytree.tree_structure(theirs)


@given(TREES, TREES)
def test_trees_of_two_structures_are_paired_exactly_where_torch_pairs_them_both_ways(tree, other):
    def pairs(run, *of):
        try:
            return run(lambda a, b: None, *of) is not ...
        except ValueError:
            return False

    both = pairs(pytree.tree_map, tree, other) and pairs(pytree.tree_map, other, tree)
    assert pairs(tree_map, tree, other) == pairs(tree_map, other, tree) == both
