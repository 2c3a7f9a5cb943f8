import pytest
import torch

from rlm_mhc import fn


@pytest.mark.parametrize("layers", [1, 2, 3, 7, 16])
def test_cumulative_gains_are_those_of_every_partial_product(layers):
    res = torch.randn(layers, 5, 3, 3, dtype=torch.float64)
    forward, backward = fn.cumulative_gain(res)
    for l in range(layers):
        torch.testing.assert_close(forward[l], fn.composite_gain(res[: l + 1])[0])
        torch.testing.assert_close(backward[l], fn.composite_gain(res[l:])[1])


def test_gains_multiply_in_the_order_of_the_layers():
    a, b = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [0.0, -1.0]])
    product = b @ a  # rows 3+6, -1; columns 3, 6-1
    forward, backward = fn.composite_gain(torch.stack([a, b]))
    assert product.tolist() == [[3.0, 6.0], [0.0, -1.0]]
    assert (forward.item(), backward.item()) == (9.0, 5.0)
    forward, backward = fn.cumulative_gain(torch.stack([a, b]))
    assert forward.tolist() == [3.0, 9.0]
    assert backward.tolist() == [5.0, 3.0]


@pytest.mark.parametrize("gain", [fn.composite_gain, fn.cumulative_gain])
def test_no_layer_has_no_gain(gain):
    with pytest.raises(ValueError, match="at least one layer"):
        gain(torch.zeros(0, 2, 2))


def test_errors_are_of_rows_and_of_columns():
    res = torch.tensor([[[0.5, 0.6], [0.5, 0.5]], [[1.0, 0.0], [0.7, 0.0]]])
    rows, columns = fn.stochasticity_error(res)
    torch.testing.assert_close(rows, torch.tensor([0.1, 0.3]))
    torch.testing.assert_close(columns, torch.tensor([0.1, 1.0]))


def test_dominance_is_the_share_of_the_largest_stream():
    x = torch.randn(7, 3, 5)
    squares = x.pow(2).sum(-1)
    torch.testing.assert_close(fn.stream_dominance(x), squares.max(-1).values / squares.sum(-1))
    torch.testing.assert_close(fn.stream_dominance(fn.expand_streams(x[:, 0], 4)), torch.full((7,), 0.25))
    assert fn.stream_dominance(torch.zeros(2, 5)) == 0
