"""Each parametrisation against its definition, written down another way and in float64."""

import itertools
import math

import numpy as np
import pytest
import torch

from rlm_mhc import fn
from rlm_mhc.fn.projections import orthostochastic
from rlm_mhc.testing import small_config
from rlm_mhc.variants import PROJECTIONS

CASES = [(name, n) for name, rule in PROJECTIONS.items() for n in (1, 2, 3, 4, 8) if rule.fits(n)]


def raw(name, n, *batch, scale=1.0):
    return scale * torch.randn(*batch, PROJECTIONS[name].raw_size(n), dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_permutations_are_weighed_by_a_softmax(n):
    x = raw("permutations", n, 5)
    weights = x.exp() / x.exp().sum(-1, keepdim=True)
    identity = torch.eye(n, dtype=torch.float64)
    expected = sum(
        w.view(-1, 1, 1) * identity[list(order)]
        for w, order in zip(weights.unbind(-1), itertools.permutations(range(n)), strict=True)
    )
    torch.testing.assert_close(fn.project(x, n, "permutations"), expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_kronecker_is_the_product_of_its_factors(n):
    x = raw("kronecker", n)
    expected = torch.ones(1, 1, dtype=torch.float64)
    for a in x.sigmoid():
        expected = torch.kron(expected, torch.stack([a, 1 - a, 1 - a, a]).view(2, 2))
    torch.testing.assert_close(fn.project(x, n, "kronecker"), expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_orthostochastic_is_the_block_norm_of_the_cayley_map(n, block):
    wide = n * block
    x = torch.randn(wide * (wide - 1) // 2, dtype=torch.float64)
    skew = torch.zeros(wide, wide, dtype=torch.float64)
    numbers = iter(x)
    for i in range(wide):
        for j in range(i + 1, wide):
            skew[i, j] = next(numbers)
            skew[j, i] = -skew[i, j]
    identity = torch.eye(wide, dtype=torch.float64)
    q = torch.from_numpy(np.linalg.inv((identity + skew).numpy())) @ (identity - skew)
    torch.testing.assert_close(q @ q.T, identity)
    expected = torch.tensor(
        [
            [q[i * block : (i + 1) * block, j * block : (j + 1) * block].square().sum() / block for j in range(n)]
            for i in range(n)
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(orthostochastic(x, n, block=block), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("name", "n"), CASES)
def test_each_starts_near_the_identity_where_its_gradient_lives(name, n):
    start = torch.tensor(PROJECTIONS[name].near_identity(n), dtype=torch.float64)
    assert fn.project(start, n, name).diagonal().min() >= 0.99
    weight = torch.randn(n, n, dtype=torch.float64)
    (gradient,) = torch.func.vjp(lambda x: fn.project(x, n, name), start)[1](weight)
    cross = n > 1 or name == "unconstrained"
    assert not gradient.numel() or not cross or gradient.abs().max() > 1e-4


@pytest.mark.parametrize(("name", "n"), CASES)
@pytest.mark.parametrize("batch", [(), (0,), (2, 3)])
def test_any_batch_shape_and_width(name, n, batch):
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        out = fn.project(raw(name, n, *batch).to(dtype), n, name)
        assert out.shape == (*batch, n, n)
        assert out.dtype == wide


@pytest.mark.parametrize("preset", ["paper", "lite", "kron", "orthostochastic", "identity", "hc"])
def test_autocast_leaves_the_mappings_alone(preset):
    params = fn.init(small_config(mhc_preset=preset)).layers[0].attn_mhc
    streams = torch.randn(3, 4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = fn.mhc_mappings(params, streams, preset=preset)
    for actual, expected in zip(mixed, fn.mhc_mappings(params, streams, preset=preset), strict=True):
        assert torch.equal(actual, expected)


def test_errors_name_the_rule():
    with pytest.raises(ValueError, match=r"permutations needs from 1 to 4"):
        fn.project(torch.zeros(math.factorial(5)), 5, "permutations")
    with pytest.raises(ValueError, match="kronecker needs a power of 2"):
        fn.project(torch.zeros(1), 3, "kronecker")
    with pytest.raises(ValueError, match=r"\[\*b, 3\]: sinkhorn of n=2 needs \[\*b, 4\]"):
        fn.project(torch.zeros(3), 2)
    with pytest.raises(ValueError, match="expected one of sinkhorn, permutations"):
        fn.project(torch.zeros(3), 2, "birkhoff")
