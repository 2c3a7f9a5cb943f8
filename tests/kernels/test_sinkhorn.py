"""The library op and its hand-written backward, against autograd of the reference loop."""

import pytest
import torch
from torch.func import vjp

from rlm_mhc import fn
from rlm_mhc.kernels import native
from rlm_mhc.kernels.sinkhorn import op, sinkhorn, sinkhorn_backward, sinkhorn_knopp
from rlm_mhc.testing import assert_as_accurate
from rlm_mhc.testing.models import double

PATHS = {"native": (sinkhorn, sinkhorn_backward), "plain": (op.plain, op.plain_backward)}


@pytest.fixture(params=PATHS)
def pair(request):
    if request.param == "native" and native.load_native(op.SOURCE) is None:
        pytest.skip("no C++ compiler on this machine")
    return PATHS[request.param]


def case(n, tokens, scale, dtype):
    generator = torch.Generator().manual_seed(n)
    logits, cotangent = (torch.randn(*tokens, n, n, generator=generator, dtype=torch.float64) for _ in range(2))
    return (logits * scale).to(dtype), cotangent.to(dtype)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 1e3, 3e4, 1e38])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8])
def test_values_and_gradient_are_those_of_the_loop(pair, n, scale):
    forward, backward = pair
    wide, single = (case(n, (17,), scale, dtype) for dtype in (torch.float64, torch.float32))
    for iters in (1, 2, 20):

        def loop(inputs, k=iters):
            value, pull = vjp(lambda x: fn.sinkhorn_knopp(x, num_iters=k), inputs[0])
            return value, pull(inputs[1])[0]

        expected, gradient = loop(wide)
        torch.testing.assert_close(forward(wide[0], iters), expected, atol=1e-14, rtol=0)
        torch.testing.assert_close(backward(*wide, iters), gradient, atol=4e-14, rtol=0)
        plain = loop(single)
        # In float32 alone differences of the largest logits are infinite.
        exact = double(plain) if scale == 1e38 else loop(double(single))
        assert_as_accurate((forward(single[0], iters), backward(*single, iters)), plain, exact, floor=1.0)


@pytest.mark.parametrize("tokens", [(), (0,), (1,), (2, 3), (100,)])
def test_any_batch_shape_and_stride(pair, tokens):
    forward, backward = pair
    logits, cotangent = case(4, tokens, 1.0, torch.float64)
    expected, pull = vjp(fn.sinkhorn_knopp, logits)
    torch.testing.assert_close(forward(logits, 20), expected)
    torch.testing.assert_close(backward(logits, cotangent, 20), pull(cotangent)[0])
    turned, expected = logits.mT, fn.sinkhorn_knopp(logits.mT)
    torch.testing.assert_close(forward(turned, 20), expected)


def test_a_loop_that_has_not_converged_is_not_taken_for_one_that_has():
    logits, cotangent = case(4, (5,), 10.0, torch.float64)
    few, many = (sinkhorn_backward(logits, cotangent, iters) for iters in (2, 200))
    assert (few - many).abs().max() > 1e-3


def test_without_a_compiler_the_plain_path_serves(monkeypatch, tmp_path):
    native.load_native.cache_clear()
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with pytest.warns(UserWarning, match="was not built"):
        assert native.load_native(op.SOURCE) is None
    logits, _ = case(4, (5,), 1.0, torch.float32)
    torch.testing.assert_close(sinkhorn(logits, 20), fn.sinkhorn_knopp(logits))
    native.load_native.cache_clear()


def test_a_library_that_others_may_write_to_is_not_loaded(tmp_path, monkeypatch):
    native.load_native.cache_clear()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    if native.load_native(op.SOURCE) is None:
        pytest.skip("no C++ compiler on this machine")
    (tmp_path / "native").chmod(0o777)
    native.load_native.cache_clear()
    with pytest.warns(UserWarning, match="others may write to it"):
        assert native.load_native(op.SOURCE) is None
    native.load_native.cache_clear()


def test_it_is_built_once(tmp_path, monkeypatch):
    native.load_native.cache_clear()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    first = native.load_native(op.SOURCE)
    if first is None:
        pytest.skip("no C++ compiler on this machine")
    (library,) = (tmp_path / "native").iterdir()
    written = library.stat().st_mtime_ns
    native.load_native.cache_clear()
    native.load_native(op.SOURCE)
    assert library.stat().st_mtime_ns == written
    native.load_native.cache_clear()


def test_its_own_backward_is_the_one_that_runs(gradient_of, monkeypatch):
    """The op is opaque, so a dropped backward is zero; and a marked one shows that it was this one that ran."""
    logits, cotangent = case(3, (6,), 1.0, torch.float64)

    def loss(f, x):
        return (f(x) * cotangent).sum()

    expected = torch.func.grad(lambda x: loss(fn.sinkhorn_knopp, x))(logits)
    actual = gradient_of(lambda x: loss(sinkhorn_knopp, x), logits)
    torch.testing.assert_close(actual, expected)
    assert expected.abs().max() > 1e-2

    module = __import__("rlm_mhc.kernels.sinkhorn.stage", fromlist=["sinkhorn_backward"])
    monkeypatch.setattr(module, "sinkhorn_backward", lambda x, g, k, eps: 3 * sinkhorn_backward(x, g, k, eps))
    torch._dynamo.reset()
    torch.testing.assert_close(gradient_of(lambda x: loss(sinkhorn_knopp, x), logits), 3 * expected)


@pytest.mark.parametrize(
    ("logits", "cotangent", "iters"),
    [
        (torch.zeros(3, 2, 2, dtype=torch.bfloat16), None, 5),
        (torch.zeros(3, 2, 3), None, 5),
        (torch.zeros(3, 0, 0), None, 5),
        (torch.zeros(3, 2, 2), torch.zeros(2, 2, 2), 5),
        (torch.zeros(3, 2, 2), torch.zeros(3, 2, 2, dtype=torch.float64), 5),
        (torch.zeros(3, 2, 2), None, 0),
    ],
)
def test_the_raw_ops_refuse_what_they_would_misread(logits, cotangent, iters):
    with pytest.raises(ValueError, match="expected"):
        sinkhorn_backward(logits, logits if cotangent is None else cotangent, iters)
    if cotangent is None:
        with pytest.raises(ValueError, match="expected"):
            sinkhorn(logits, iters)


def test_large_n_takes_the_plain_path():
    logits, _ = case(33, (2,), 1.0, torch.float64)
    torch.testing.assert_close(sinkhorn(logits, 3), fn.sinkhorn_knopp(logits, num_iters=3))


def test_vmap_and_refusals():
    logits, _ = case(3, (4, 5), 1.0, torch.float64)
    for axis in (0, 1):
        torch.testing.assert_close(
            torch.vmap(sinkhorn_knopp, in_dims=axis, out_dims=axis)(logits), fn.sinkhorn_knopp(logits)
        )
    with pytest.raises(ValueError, match="num_iters=0"):
        sinkhorn_knopp(logits, num_iters=0)
