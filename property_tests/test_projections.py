"""What every parametrisation of the Birkhoff polytope promises, and the derivatives of all of them."""

import itertools
from functools import partial

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlm_mhc import fn
from rlm_mhc.testing.strategies import BIRKHOFF, raw_numbers
from rlm_mhc.variants import PROJECTIONS

EXACT = [name for name in BIRKHOFF if name != "sinkhorn"]
TWICE = [*BIRKHOFF, "unconstrained", "sinkhorn with eps", "sinkhorn of two iterations", "sinkhorn at its limit"]


def ones_like(sums):
    return torch.allclose(sums, torch.ones_like(sums), atol=1e-5, rtol=0)


def function(name, n):
    """One of `TWICE`, of raw numbers."""
    if name == "sinkhorn with eps":
        return partial(fn.project, n=n, eps=1e-3)
    if name == "sinkhorn of two iterations":
        return partial(fn.project, n=n, num_iters=2)
    if name == "sinkhorn at its limit":
        return lambda raw: fn.sinkhorn_implicit(raw.unflatten(-1, (n, n)), num_iters=400)
    return partial(fn.project, n=n, projection=name)


def derivative(case, seed):
    """The function of a case, its raw numbers, a direction of them, a cotangent, and what vjp makes of that."""
    name, n, raw = case
    f, generator = function(name, n), torch.Generator().manual_seed(seed)
    res, pull = torch.func.vjp(f, raw)
    direction, cotangent = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (raw, res))
    return f, raw, direction, cotangent, pull(cotangent)[0]


@given(raw_numbers(BIRKHOFF))
def test_entries_are_not_negative_and_rows_sum_to_one(case):
    name, n, raw = case
    res = fn.project(raw, n, name)
    assert (res >= 0).all()
    assert ones_like(res.sum(-1))


@given(raw_numbers(EXACT))
def test_columns_of_the_exact_ones_sum_to_one(case):
    name, n, raw = case
    assert ones_like(fn.project(raw, n, name).sum(-2))


@given(raw_numbers([*(name for name in BIRKHOFF if name != "identity"), *TWICE[-2:]], batch=(3,)), st.integers(0, 999))
def test_nan_makes_its_matrix_nan_and_no_other(case, entry):
    name, n, raw = case
    if not raw.shape[-1]:
        return
    raw[1, entry % raw.shape[-1]] = torch.nan
    res, pull = torch.func.vjp(function(name, n), raw)
    of_raw = pull(torch.randn(res.shape))[0]
    one = torch.tensor([False, True, False])
    assert torch.equal(res.isnan().any((-1, -2)), one)
    assert of_raw[~one].isfinite().all()
    assert of_raw[1].isnan().any() or raw.shape[-1] == 1  # the derivative of clamp at NaN is 0
    if name != "kronecker":
        assert res[1].isnan().all()


@given(st.one_of(raw_numbers(BIRKHOFF), raw_numbers(BIRKHOFF, scale=1e38, largest=3e38)))
def test_value_and_gradient_are_finite_for_any_finite_numbers(case):
    name, n, raw = case
    res, pull = torch.func.vjp(lambda x: fn.project(x, n, name), raw)
    assert res.isfinite().all()
    assert pull(torch.ones_like(res))[0].isfinite().all()


@given(raw_numbers(EXACT, batch=(6, 2)))
def test_products_of_doubly_stochastic_matrices_stay_so_and_their_gain_is_one(case):
    name, n, raw = case
    res = fn.project(raw, n, name)
    product = torch.linalg.multi_dot(list(res[:, 0])) if n > 1 else res[0, 0]
    assert ones_like(product.sum(-1))
    assert ones_like(product.sum(-2))
    assert all(ones_like(gain) for gain in (*fn.composite_gain(res), *fn.cumulative_gain(res)))


@given(raw_numbers(TWICE, scale=1.0, dtype=torch.float64), st.integers(0, 2**32))
def test_gradient_of_every_projection_equals_the_central_difference(case, seed):
    f, raw, direction, cotangent, pulled = derivative(case, seed)
    slope = (cotangent * (f(raw + 1e-5 * direction) - f(raw - 1e-5 * direction))).sum() / 2e-5
    assert torch.allclose((pulled * direction).sum(), slope, rtol=1e-5, atol=1e-7)


@given(raw_numbers(TWICE, scale=1.0, dtype=torch.float64), st.integers(0, 2**32))
def test_jvp_is_the_transpose_of_vjp(case, seed):
    f, raw, direction, cotangent, pulled = derivative(case, seed)
    _, tangent = torch.func.jvp(f, (raw,), (direction,))
    assert torch.allclose((tangent * cotangent).sum(), (direction * pulled).sum(), rtol=1e-8, atol=1e-10)


@given(st.integers(1, 4), st.integers(0, 2**32), st.randoms(use_true_random=False))
def test_weights_of_permutations_permute_with_the_rows(n, seed, random):
    orders = list(itertools.permutations(range(n)))
    raw = torch.randn(len(orders), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = random.sample(range(n), n)
    moved = torch.stack([raw[orders.index(tuple(order[rows.index(i)] for i in range(n)))] for order in orders])
    expected = fn.project(raw, n, "permutations")[rows]
    assert torch.allclose(fn.project(moved, n, "permutations"), expected, atol=1e-12)


@given(st.sampled_from([1, 2, 4, 8]), st.data())
def test_a_negative_kronecker_factor_swaps_the_streams_it_mixes(n, data):
    raw = data.draw(raw_numbers(["kronecker"], streams=n, batch=(3,), dtype=torch.float64))[2]
    factor = data.draw(st.integers(0, max(0, raw.shape[-1] - 1)))
    sign = torch.ones_like(raw)
    sign[..., factor : factor + 1] = -1
    swapped = torch.arange(n) ^ (n >> (factor + 1))
    assert torch.equal(fn.project(sign * raw, n, "kronecker"), fn.project(raw, n, "kronecker")[..., swapped])


@given(st.sampled_from(BIRKHOFF), st.sampled_from([2, 4]), st.integers(0, 2**32))
def test_every_projection_starts_near_the_identity_where_its_gradient_does_not_vanish(name, n, seed):
    raw = torch.tensor(PROJECTIONS[name].near_identity(n), dtype=torch.float64)
    res, pull = torch.func.vjp(lambda x: fn.project(x, n, name), raw)
    assert (res.diagonal() > 0.99).all()
    generator = torch.Generator().manual_seed(seed)
    (gradient,) = pull(torch.randn(n, n, generator=generator, dtype=torch.float64))
    assert (gradient.abs() > 1e-9).all()
