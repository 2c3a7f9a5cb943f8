import pytest
import torch

from rlm_mhc import fn


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
