import pytest
import torch

from rlm_mhc import fn
from rlm_mhc.fn.clip import PIECE, WIDENED_AT_ONCE, leaf_norms
from rlm_mhc.testing import assert_trees_close


def exact(x):
    return x.double().square().sum().sqrt()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1, 5 * PIECE - 1, WIDENED_AT_ONCE + PIECE + 3])
def test_a_norm_is_computed_in_fp32_or_wider(dtype, size):
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    norm = leaf_norms((x,))[0]
    assert norm.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(norm.double(), exact(x), rtol=1e-13 if dtype == torch.float64 else 1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("view", [lambda x: x[:, 0], lambda x: x.T, lambda x: x.flip(0), lambda x: x[:1].expand(9, 2)])
def test_a_view_is_summed_as_exactly_as_what_it_shows(view, dtype):
    # Equal entries, of which a running sum of 512 squares is off by 3.9e-6.
    x = view(torch.full((100_000, 2), 0.711629331111908, dtype=dtype))
    torch.testing.assert_close(leaf_norms((x,))[0].double(), exact(x), rtol=1e-6, atol=0)


def test_many_equal_entries_are_summed_without_bias():
    # All roundings of a running sum go the same way here: torch's own norm is off by 0.9 %, a dot product by 0.3 %.
    x = torch.full((65_000_000,), 0.3)
    expected = x[0].item() * 65_000_000**0.5
    assert fn.global_norm((x,)).item() == pytest.approx(expected, rel=1e-6)
    assert fn.global_norm((x[::2], x[1::2])).item() == pytest.approx(expected, rel=1e-6)


def test_fp16_gradients_whose_squares_overflow_are_clipped():
    (clipped,), norm = fn.clip_by_global_norm((torch.full((100_000,), 300.0, dtype=torch.float16),), 1.0)
    assert norm.item() == pytest.approx(300 * 100_000**0.5, rel=1e-6)
    assert clipped.dtype == torch.float16
    torch.testing.assert_close(clipped.float(), torch.full((100_000,), 100_000**-0.5), rtol=1e-3, atol=0)


def test_dtypes_may_differ_and_stay():
    grads = {"a": torch.full((4,), 3.0, dtype=torch.bfloat16), "b": torch.full((1,), 8.0, dtype=torch.float64)}
    clipped, norm = fn.clip_by_global_norm(grads, 5.0)
    assert norm == 10
    assert_trees_close(clipped, {"a": torch.full((4,), 1.5), "b": torch.full((1,), 4.0)}, 1e-6)
    assert {name: g.dtype for name, g in clipped.items()} == {"a": torch.bfloat16, "b": torch.float64}


@pytest.mark.parametrize("tree", [(), {}, [(), ()], (torch.zeros(0),)])
def test_the_norm_of_nothing_is_zero(tree):
    clipped, norm = fn.clip_by_global_norm(tree, 1.0)
    assert (norm, norm.dtype) == (0, torch.float32)
    assert type(clipped) is type(tree)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_is_not_lost(bad):
    x = torch.ones(3 * PIECE)
    x[PIECE + 5] = bad
    assert not fn.global_norm((x,)).isfinite()


def test_clipping_can_be_differentiated():
    def length(x):
        (clipped,), _ = fn.clip_by_global_norm((x,), 1.0)
        return clipped.sum()

    x = torch.tensor([3.0, 4.0], dtype=torch.float64)
    expected = torch.autograd.functional.jacobian(lambda x: (x / x.square().sum().sqrt()).sum(), x)
    torch.testing.assert_close(torch.func.grad(length)(x), expected)
    torch.testing.assert_close(
        torch.vmap(torch.func.grad(length))(torch.stack([x, x / 10])), torch.stack([expected, torch.ones_like(x)])
    )
