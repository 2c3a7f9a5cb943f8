"""A comparison of roundings lets no fault through that is a few times larger than they are."""

import pytest
import torch

from rlm_mhc.testing import TOLERANCE, assert_as_accurate, assert_trees_close
from rlm_mhc.testing.compare import FACTOR, ROUNDINGS, SHARE
from rlm_mhc.tree import tree_map

EPS = torch.finfo(torch.float32).eps


def case(dtype=torch.float32, error=0.0):
    """A tree in float64, and the same in a lower dtype with an error in one entry of `large`."""
    exact = {"large": torch.linspace(-2, 2, 9, dtype=torch.float64), "layer": (torch.zeros(3, dtype=torch.float64),)}
    low = tree_map(lambda x: x.to(dtype), exact)
    low["large"][0] += error
    return exact, low


@pytest.mark.parametrize(
    ("dtype", "usual", "allowed"),
    [
        (torch.float32, 0.0, FACTOR * ROUNDINGS[torch.float32] * EPS * 2),  # plain is exact by chance
        (torch.float32, 1e-3, FACTOR * 1e-3),
        (torch.bfloat16, 0.0, FACTOR * ROUNDINGS[torch.bfloat16] * 2**-7 * 2),
        (torch.float64, 0.0, TOLERANCE[torch.float64] * 2),
    ],
)
def test_errors_up_to_those_of_plain_pass_and_larger_ones_do_not(dtype, usual, allowed):
    exact, plain = case(dtype, usual)
    for sign in (-1, 1):
        assert_as_accurate(case(torch.float64, 0.9 * sign * allowed)[1], plain, exact)
        with pytest.raises(AssertionError, match=r"^large: differs by .*, allowed "):
            assert_as_accurate(case(torch.float64, 1.1 * sign * allowed)[1], plain, exact)


def test_the_factor_is_an_argument():
    exact, plain = case(error=1e-3)
    assert_as_accurate(case(torch.float64, 9e-3)[1], plain, exact, factor=10)
    with pytest.raises(AssertionError, match="differs by"):
        assert_as_accurate(case(torch.float64, 1.1e-2)[1], plain, exact, factor=10)


def test_a_leaf_that_is_zero_by_symmetry_is_measured_by_its_neighbours():
    exact, plain = case()
    allowed = FACTOR * ROUNDINGS[torch.float32] * EPS * SHARE * 2
    assert_as_accurate(exact | {"layer": (torch.full((3,), 0.9 * allowed),)}, plain, exact)
    with pytest.raises(AssertionError, match=r"^layer\.0: differs by"):
        assert_as_accurate(exact | {"layer": (torch.full((3,), 1.1 * allowed),)}, plain, exact)
    assert_as_accurate(exact | {"layer": (torch.full((3,), 1.1 * allowed),)}, plain, exact, floor=0.1)


def changed(f):
    exact, plain = case()
    return exact | {"large": f(plain["large"])}


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x * 1.0001,
        lambda x: x.roll(1),
        lambda x: -x,
        lambda x: x.bfloat16().float() + 2**-12,
        lambda x: torch.zeros_like(x),
        lambda x: x / 0,
        lambda x: x * float("nan"),
    ],
)
def test_faults_of_one_leaf_are_caught(fault):
    exact, plain = case()
    with pytest.raises(AssertionError, match=r"^large: differs by"):
        assert_as_accurate(changed(fault), plain, exact)


@pytest.mark.parametrize("compare", [assert_as_accurate, lambda a, _, e: assert_trees_close(a, e, 1.0)])
def test_other_names_and_shapes_are_no_match(compare):
    exact, plain = case()
    with pytest.raises(AssertionError, match=r"other names: \['layer\.0'\]"):
        compare(exact | {"layer": ()}, plain, exact)
    with pytest.raises(AssertionError, match=r"large: shape \(1, 9\), not \(9,\)"):
        compare(changed(lambda x: x[None]), plain, exact)


@pytest.mark.parametrize("error", [0.02, float("inf"), float("nan")])
def test_an_error_that_plain_makes_too_does_not_pass(error):
    exact, wrong = case(error=error)
    with pytest.raises(AssertionError, match=r"^large: plain itself differs"):
        assert_as_accurate(wrong, wrong, exact)


def test_leaves_without_entries_and_single_tensors_are_trees_too():
    exact = torch.tensor(2.0, dtype=torch.float64)
    assert_as_accurate(exact.float(), exact.float(), exact)
    with pytest.raises(AssertionError, match="differs by"):
        assert_as_accurate(exact.float() + 1e-3, exact.float(), exact)
    nothing = {"a": torch.zeros(0, 3)}
    assert_as_accurate(nothing, nothing, nothing)
    assert_as_accurate((), (), ())


@pytest.mark.parametrize("compare", [assert_as_accurate, lambda a, _, e: assert_trees_close(a, e, 1.0)])
def test_integers_are_equal(compare):
    exact, plain = (tree | {"lengths": torch.tensor([1, 2])} for tree in case())
    compare(plain, plain, exact)
    with pytest.raises(AssertionError, match="lengths: other integers"):
        compare(plain | {"lengths": torch.tensor([1, 3])}, plain, exact)
