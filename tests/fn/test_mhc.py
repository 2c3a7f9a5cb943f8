import pytest
import torch
from jaxtyping import TypeCheckError

from rlm_mhc import fn


def random_params(n, c, dtype=torch.float32):
    size = 2 * n + n * n
    return fn.MHCParams(
        torch.randn(n * c, size, dtype=dtype), torch.randn(3, dtype=dtype), torch.randn(size, dtype=dtype)
    )


def test_combine_applies_res_untransposed():
    res = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    streams = torch.tensor([[10.0], [20.0], [30.0]])
    out = fn.mhc_combine(streams, torch.zeros(1), torch.zeros(3), res)
    assert out.flatten().tolist() == [20.0, 30.0, 10.0]


def test_mappings_equal_the_written_formula():
    n, c = 3, 8
    params, x = random_params(n, c, torch.float64), torch.randn(4, n, c, dtype=torch.float64)
    v = x.reshape(4, n * c)
    h = (v / (v.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()) @ params.phi
    pre, post, res = fn.mhc_mappings(params, x)
    a, b = params.alpha, params.bias
    torch.testing.assert_close(pre, torch.sigmoid(a[0] * h[:, :n] + b[:n]))
    torch.testing.assert_close(post, 2 * torch.sigmoid(a[1] * h[:, n : 2 * n] + b[n : 2 * n]))
    raw = (a[2] * h[:, 2 * n :] + b[2 * n :]).view(4, n, n)
    torch.testing.assert_close(res, fn.sinkhorn_knopp(raw))


def test_aggregate_and_combine_equal_einsum():
    x, y = torch.randn(2, 5, 4, 7), torch.randn(2, 5, 7)
    pre, post, res = torch.rand(2, 5, 4), torch.rand(2, 5, 4), torch.rand(2, 5, 4, 4)
    torch.testing.assert_close(fn.mhc_aggregate(x, pre), torch.einsum("bsn,bsnc->bsc", pre, x))
    expected = torch.einsum("bsij,bsjc->bsic", res, x) + torch.einsum("bsi,bsc->bsic", post, y)
    torch.testing.assert_close(fn.mhc_combine(x, y, post, res), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype):
    x = torch.randn(2, 4, 8).to(dtype)
    mappings = fn.mhc_mappings(random_params(4, 8), x)
    wide = torch.promote_types(dtype, torch.float32)
    assert {m.dtype for m in mappings} == {wide}
    u = fn.mhc_aggregate(x, mappings.pre)
    assert u.dtype == dtype
    assert fn.mhc_combine(x, u, mappings.post, mappings.res).dtype == dtype
    assert fn.collapse_streams(fn.expand_streams(u, 3)).dtype == dtype


def test_streams_enter_equal_and_leave_as_their_mean():
    x = torch.randn(2, 3, 5)
    streams = fn.expand_streams(x, 4)
    assert streams.is_contiguous()
    assert all(torch.equal(streams[..., i, :], x) for i in range(4))
    y = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(fn.collapse_streams(y), y.mean(-2))


def test_wrong_sizes_say_what_is_needed():
    with pytest.raises(ValueError, match=r"n=3, c=8 need .* = \(24, 15\)"):
        fn.mhc_mappings(random_params(4, 8), torch.randn(2, 3, 8))
    with pytest.raises(ValueError, match="n=0"):
        fn.expand_streams(torch.ones(3), 0)


def test_the_shape_hook_is_on():
    with pytest.raises(TypeCheckError):
        fn.mhc_aggregate(torch.ones(2, 4, 8), torch.ones(2, 3))


def test_mappings_stay_fp32_under_autocast():
    params, streams = random_params(4, 32), torch.randn(3, 4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = fn.mhc_mappings(params, streams)
    for actual, expected in zip(mixed, fn.mhc_mappings(params, streams), strict=True):
        assert torch.equal(actual, expected)
