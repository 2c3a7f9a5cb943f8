import torch
from hypothesis import given
from hypothesis import strategies as st

from rlm_mhc import fn
from rlm_mhc.testing.strategies import square_logits


@given(square_logits())
def test_sinkhorn_has_unit_rows_and_is_non_negative_and_finite(logits):
    out = fn.sinkhorn_knopp(logits)
    assert out.isfinite().all()
    assert (out >= 0).all()
    assert torch.allclose(out.sum(-1), torch.ones(out.shape[:-1]), atol=1e-5, rtol=0)


@given(st.integers(2, 4), st.integers(0, 2**32))
def test_sinkhorn_and_its_gradient_are_finite_where_differences_of_logits_are_not(n, seed):
    signs = torch.randint(-1, 2, (1000, n, n), generator=torch.Generator().manual_seed(seed))
    out, pull = torch.func.vjp(fn.sinkhorn_knopp, 3e38 * signs.float())
    assert out.isfinite().all()
    assert pull(out)[0].isfinite().all()


@given(square_logits(scale=1.0, dtype=torch.float64))
def test_sinkhorn_has_unit_columns_once_converged(logits):
    columns = fn.sinkhorn_knopp(logits, num_iters=300).sum(-2)
    assert torch.allclose(columns, torch.ones_like(columns), atol=1e-6, rtol=0)


@given(square_logits(scale=1.0, dtype=torch.float64), st.randoms(use_true_random=False))
def test_sinkhorn_permutes_with_its_rows_and_columns(logits, random):
    n = logits.shape[-1]
    rows, columns = (torch.tensor(random.sample(range(n), n)) for _ in range(2))
    permuted = fn.sinkhorn_knopp(logits[..., rows, :][..., columns])
    assert torch.allclose(permuted, fn.sinkhorn_knopp(logits)[..., rows, :][..., columns], atol=1e-12)


@given(square_logits(scale=1.0, dtype=torch.float64), st.floats(-50, 50))
def test_a_constant_added_to_a_column_changes_nothing(logits, constant):
    shifted = logits.clone()
    shifted[..., 0] += constant
    assert torch.allclose(fn.sinkhorn_knopp(shifted), fn.sinkhorn_knopp(logits), atol=1e-10)


@given(square_logits(scale=1.0, dtype=torch.float64), st.floats(-3, 3))
def test_a_constant_added_to_a_row_changes_nothing_once_converged(logits, constant):
    shifted = logits.clone()
    shifted[..., 0, :] += constant
    a, b = fn.sinkhorn_knopp(shifted, num_iters=300), fn.sinkhorn_knopp(logits, num_iters=300)
    assert torch.allclose(a, b, atol=1e-6)


@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 2**32))
def test_res_sends_stream_j_to_stream_i_untransposed(n, c, seed):
    generator = torch.Generator().manual_seed(seed)
    streams = torch.randn(n, c, generator=generator)
    i, j = 0, n - 1
    res = torch.zeros(n, n)
    res[i, j] = 1.0
    out = fn.mhc_combine(streams, torch.zeros(c), torch.zeros(n), res)
    assert torch.equal(out[i], streams[j])
    assert not out[1:].any()


@given(st.integers(2, 5), st.integers(0, 2**32))
def test_mappings_use_their_logits_row_major_and_untransposed(n, seed):
    bias = torch.zeros(2 * n + n * n)
    i, j = 0, n - 1
    bias[2 * n + i * n + j] = 8.0
    params = fn.MHCParams(torch.zeros(n, 2 * n + n * n), torch.ones(3), bias)
    res = fn.mhc_mappings(params, torch.randn(n, 1, generator=torch.Generator().manual_seed(seed))).res
    assert res[i, j] > 0.9
    assert res[i, j] > res[j, i] + 0.1 or n == 2


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**32))
def test_composite_forward_gain_of_row_stochastic_matrices_is_one(n, layers, seed):
    logits = torch.randn(layers, 3, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    forward, backward = fn.composite_gain(fn.sinkhorn_knopp(3 * logits, num_iters=5))
    assert torch.allclose(forward, torch.ones_like(forward), atol=1e-10)
    assert (backward >= 1 - 1e-10).all()


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**32))
def test_equal_streams_stay_equal_where_nothing_is_added(n, c, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, c, generator=generator, dtype=torch.float64)
    res = fn.sinkhorn_knopp(torch.randn(2, n, n, generator=generator, dtype=torch.float64))
    streams = fn.expand_streams(x, n)
    out = fn.mhc_combine(streams, torch.zeros_like(x), torch.ones(2, n, dtype=torch.float64), res)
    assert torch.allclose(out, streams, atol=1e-12)
    assert torch.allclose(fn.collapse_streams(out), x, atol=1e-12)


@given(st.integers(1, 5), st.integers(0, 2**32))
def test_gates_are_a_sigmoid_and_twice_one(n, seed):
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(2 * n + n * n, generator=generator)
    params = fn.MHCParams(torch.zeros(2 * n, 2 * n + n * n), torch.ones(3), bias)
    pre, post, _ = fn.mhc_mappings(params, torch.randn(n, 2, generator=generator))
    assert torch.allclose(pre, 1 / (1 + (-bias[:n]).exp()), atol=1e-6)
    assert torch.allclose(post, 2 / (1 + (-bias[n : 2 * n]).exp()), atol=1e-6)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32))
def test_each_alpha_scales_its_own_part(n, c, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, generator=generator, dtype=torch.float64)
    phi = torch.randn(n * c, 2 * n + n * n, generator=generator, dtype=torch.float64)
    alpha = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    h = x.flatten() @ phi / (x.square().mean() + 1e-6).sqrt()
    pre, post, res = fn.mhc_mappings(fn.MHCParams(phi, alpha, torch.zeros_like(phi[0])), x)
    assert torch.allclose(pre, h[:n].sigmoid(), rtol=1e-9)
    assert torch.allclose(post, 2 * (2 * h[n : 2 * n]).sigmoid(), rtol=1e-9)
    assert torch.allclose(res, fn.sinkhorn_knopp(0.5 * h[2 * n :].view(n, n)), rtol=1e-9)


@given(st.integers(1, 4), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), st.integers(0, 2**32))
def test_mappings_are_those_of_the_widened_streams_and_streams_keep_their_dtype(n, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, n, 4, generator=generator).to(dtype)
    phi = torch.randn(4 * n, 2 * n + n * n, generator=generator)
    params = fn.MHCParams(phi, torch.ones(3), torch.zeros_like(phi[0]))
    mappings, expected = fn.mhc_mappings(params, x), fn.mhc_mappings(params, x.float())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(mappings, expected, strict=True))
    u = fn.mhc_aggregate(x, mappings.pre)
    assert u.dtype == fn.mhc_combine(x, u, *mappings[1:]).dtype == fn.collapse_streams(x).dtype == dtype


@given(square_logits(scale=2.0, dtype=torch.float64))
def test_rows_come_last(logits):
    rows, _ = fn.stochasticity_error(fn.sinkhorn_knopp(logits, num_iters=1))
    assert (rows < 1e-12).all()


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32))
def test_cumulative_gains_end_in_the_composite_gain(layers, n, seed):
    res = torch.randn(layers, 2, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    forward, backward = fn.cumulative_gain(res)
    product = res[0]
    for matrix in res[1:]:
        product = matrix @ product
    for gain, axis in ((forward[-1], -1), (backward[0], -2)):
        assert torch.allclose(gain, product.sum(axis).abs().amax(-1))
    assert torch.allclose(torch.stack(fn.composite_gain(res)), torch.stack([forward[-1], backward[0]]))
