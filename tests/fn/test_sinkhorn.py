import pytest
import torch

from rlm_mhc import fn
from rlm_mhc.testing.memory import peak_bytes


def plain(logits, iterations=20):
    """The textbook iteration, in float64."""
    m = logits.double().exp()
    for _ in range(iterations):
        m = m / m.sum(-2, keepdim=True)
        m = m / m.sum(-1, keepdim=True)
    return m


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_equals_the_textbook_iteration(n):
    logits = torch.randn(7, n, n, dtype=torch.float64)
    torch.testing.assert_close(fn.sinkhorn_knopp(logits), plain(logits), atol=1e-14, rtol=0)


def test_rows_last():
    logits = 10 * torch.randn(100, 4, 4)
    out = fn.sinkhorn_knopp(logits, num_iters=1)
    assert (out.sum(-1) - 1).abs().max() < 1e-6
    assert (out.sum(-2) - 1).abs().max() > 1e-2


def test_gradient_is_that_of_the_finite_iteration():
    logits = torch.randn(5, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, 4, dtype=torch.float64)
    (ours,) = torch.autograd.grad((fn.sinkhorn_knopp(logits, num_iters=3) * weight).sum(), logits)
    (theirs,) = torch.autograd.grad((plain(logits, 3) * weight).sum(), logits)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [1e2, 3e4, 1e10, 3e38])
def test_value_and_gradient_are_finite_for_any_finite_logits(size):
    logits = size * (2 * torch.rand(50, 4, 4) - 1)
    logits[0] = size * torch.tensor([[1.0, -1, -1, -1], [1, -1, -1, -1], [1, -1, -1, -1], [1, -1, -1, -1]])
    logits[1] = -size
    logits.requires_grad_()
    out = fn.sinkhorn_knopp(logits)
    (grad,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), logits)
    assert out.isfinite().all()
    assert grad.isfinite().all()
    assert (out.sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("given", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_computes_in_fp32_or_wider(given, expected):
    assert fn.sinkhorn_knopp(torch.randn(2, 3, 3).to(given)).dtype == expected


def test_empty_batch_and_wrong_iterations():
    assert fn.sinkhorn_knopp(torch.zeros(0, 4, 4)).shape == (0, 4, 4)
    with pytest.raises(ValueError, match="num_iters=0"):
        fn.sinkhorn_knopp(torch.zeros(2, 2), num_iters=0)


def deepseek(logits, iterations, eps):
    """DeepSeek-V4's iteration on the transpose, as written there."""
    m = logits.mT.softmax(-1) + eps
    m = m / (m.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        m = m / (m.sum(-1, keepdim=True) + eps)
        m = m / (m.sum(-2, keepdim=True) + eps)
    return m.mT


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.1])
@pytest.mark.parametrize("iters", [1, 3, 20])
@pytest.mark.parametrize(("n", "batch"), [(1, (3,)), (2, ()), (3, (2, 2)), (4, (300,)), (4, (0,)), (8, (3,))])
def test_gradient_equals_float64_autograd_of_the_loop(n, batch, iters, eps):
    logits = 2 * torch.randn(*batch, n, n, dtype=torch.float64)
    weight = torch.randn_like(logits)
    loop = (lambda x: deepseek(x, iters, eps)) if eps else (lambda x: plain(x, iters))
    expected, pull = torch.func.vjp(loop, logits)
    actual, own = torch.func.vjp(lambda x: fn.sinkhorn_knopp(x, num_iters=iters, eps=eps), logits)
    torch.testing.assert_close(actual, expected, atol=1e-13, rtol=0)
    torch.testing.assert_close(own(weight)[0], pull(weight)[0], atol=1e-10, rtol=0)
    _, slope = torch.func.jvp(lambda x: fn.sinkhorn_knopp(x, num_iters=iters, eps=eps), (logits,), (weight,))
    torch.testing.assert_close(slope, torch.func.jvp(loop, (logits,), (weight,))[1], atol=1e-10, rtol=0)


def test_what_is_kept_for_the_backward_does_not_grow_with_the_iterations():
    logits, sizes = torch.randn(64, 4, 4, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        for iters in (1, 500):
            fn.sinkhorn_knopp(logits, num_iters=iters)
    assert sizes == [logits.numel()] * 2


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_the_memory_of_the_forward_does_not_grow_with_the_iterations(eps):
    logits = torch.randn(20000, 4, 4)
    few, many = (
        peak_bytes(lambda k=iters: fn.sinkhorn_knopp(logits, num_iters=k, eps=eps), torch.device("cpu"))
        for iters in (10, 80)
    )
    assert many <= 1.1 * few


def test_the_memory_of_the_backward_does_not_grow_with_the_iterations():
    logits, weight = torch.randn(2, 20000, 4, 4).unbind()
    peaks = []
    for iters in (10, 80):
        _, pull = torch.func.vjp(lambda x, k=iters: fn.sinkhorn_knopp(x, num_iters=k), logits)
        peaks.append(peak_bytes(lambda pull=pull: pull(weight), torch.device("cpu")))
    assert peaks[1] <= 1.1 * peaks[0]


def test_second_derivatives_and_batches_of_gradients():
    logits, weight = torch.randn(2, 3, 3, 3, dtype=torch.float64).unbind()

    def value(f):
        return lambda x, w: (f(x) * w).sum()

    ours, theirs = (
        value(lambda x: fn.sinkhorn_knopp(x, num_iters=4)),
        value(lambda x: plain(x, 4)),
    )
    for transform in (
        lambda f: torch.func.jacrev(torch.func.grad(f)),
        lambda f: torch.func.jacfwd(torch.func.grad(f)),
        lambda f: torch.vmap(torch.func.grad(f)),
        lambda f: torch.func.jacfwd(f),
    ):
        torch.testing.assert_close(
            transform(ours)(logits, weight), transform(theirs)(logits, weight), atol=1e-10, rtol=0
        )


def test_a_tolerance_stops_the_iteration_when_all_have_it():
    logits = 3 * torch.randn(50, 4, 4, dtype=torch.float64)
    for tolerance in (1e-2, 1e-6, 1e-10):
        out = fn.sinkhorn_knopp(logits, num_iters=10_000, tolerance=tolerance)
        assert (out.sum(-2) - 1).abs().max() <= tolerance
    fewest = next(k for k in range(1, 999) if (plain(logits, k).sum(-2) - 1).abs().max() <= 1e-6)
    torch.testing.assert_close(
        fn.sinkhorn_knopp(logits, num_iters=999, tolerance=1e-6), plain(logits, fewest), atol=1e-13, rtol=0
    )
    most = fn.sinkhorn_knopp(logits, num_iters=3, tolerance=1e-10)
    torch.testing.assert_close(most, plain(logits, 3), atol=1e-13, rtol=0)
    assert fn.sinkhorn_knopp(torch.zeros(0, 2, 2), tolerance=0.1).shape == (0, 2, 2)
    with pytest.raises(ValueError, match="tolerance=-1"):
        fn.sinkhorn_knopp(torch.zeros(2, 2), tolerance=-1.0)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_implicit_gradient_is_that_of_the_limit(n):
    logits, weight = torch.randn(2, 6, n, n, dtype=torch.float64).unbind()
    expected, pull = torch.func.vjp(lambda x: plain(x, 500), logits)
    actual, own = torch.func.vjp(lambda x: fn.sinkhorn_implicit(x, num_iters=500), logits)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(own(weight)[0], pull(weight)[0], atol=1e-9, rtol=0)
    _, slope = torch.func.jvp(lambda x: fn.sinkhorn_implicit(x, num_iters=500), (logits,), (weight,))
    torch.testing.assert_close(slope, torch.func.jvp(lambda x: plain(x, 500), (logits,), (weight,))[1])


def test_implicit_error_is_within_what_is_stated():
    logits, weight = torch.randn(2, 200, 4, 4, dtype=torch.float64).unbind()
    logits = logits * torch.linspace(0.1, 4, 200, dtype=torch.float64).view(-1, 1, 1)
    (limit,) = torch.func.vjp(lambda x: plain(x, 20_000), logits)[1](weight)
    for iters in (3, 10, 30):
        out, pull = torch.func.vjp(lambda x, k=iters: fn.sinkhorn_implicit(x, num_iters=k), logits)
        off = (out.sum(-2) - 1).abs().amax(-1)
        sigma = torch.linalg.svdvals(out)[..., 1]
        bound = off * weight.flatten(1).norm(dim=1) / (1 - sigma) ** 2
        error = (pull(weight)[0] - limit).flatten(1).norm(dim=1)
        assert (error <= 3 * bound + 1e-9).all()


def test_implicit_gradient_is_finite_for_any_finite_logits():
    logits = 1e4 * torch.randn(50, 4, 4)
    (grad,) = torch.func.vjp(fn.sinkhorn_implicit, logits)[1](torch.randn_like(logits))
    assert grad.isfinite().all()
