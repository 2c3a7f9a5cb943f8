import pytest
import torch
import torch.nn.utils.parametrize

from rlm_mhc import fn
from rlm_mhc.model.mhc import mHCLayer


def test_it_is_the_hyper_connection_of_fn():
    layer, branch = mHCLayer(hidden_dim=8, num_flows=3), torch.nn.Linear(8, 8)
    streams = torch.randn(2, 5, 3, 8)
    pre, post, res = fn.mhc_mappings(layer.tree(), streams)
    expected = fn.mhc_combine(streams, branch(fn.mhc_aggregate(streams, pre)), post, res)
    assert torch.equal(layer(streams, branch), expected)
    layer(streams, branch).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_the_connection_matrix_is_doubly_stochastic_and_near_the_identity():
    layer = mHCLayer(hidden_dim=8, num_flows=4)
    matrix = layer.get_connection_matrix()
    torch.testing.assert_close(matrix.sum(0), torch.ones(4))
    torch.testing.assert_close(matrix.sum(1), torch.ones(4))
    assert (matrix.diagonal() >= 0.99).all()
    with torch.no_grad():
        layer.alpha += 1
        layer.bias += torch.randn(24)
    # Whatever depends on the streams, which is all but the bias, is left out.
    assert torch.equal(layer.get_connection_matrix(), fn.sinkhorn_knopp(layer.bias[8:].view(4, 4)))


@pytest.mark.parametrize("preset", ["deepseek_v4", "hc", "lite", "kron", "orthostochastic", "identity"])
def test_every_preset_runs(preset):
    layer = mHCLayer(hidden_dim=8, num_flows=4, preset=preset)
    assert layer(torch.randn(2, 4, 8), torch.tanh).shape == (2, 4, 8)


def test_single_pass_hands_pre_on():
    layer = mHCLayer(hidden_dim=8, num_flows=4, preset="single_pass")
    after = layer(fn.Hidden(torch.randn(2, 4, 8), torch.rand(2, 4)), torch.tanh)
    assert after.pre.shape == (2, 4)


def test_initial_weights_follow_the_seed():
    def phi(seed):
        torch.manual_seed(seed)
        return mHCLayer(hidden_dim=8).phi

    assert torch.equal(phi(1), phi(1))
    assert not torch.equal(phi(1), phi(2))


def test_wrong_values_are_named():
    with pytest.raises(ValueError, match="mhc_flows=0"):
        mHCLayer(hidden_dim=8, num_flows=0)
    with pytest.raises(ValueError, match="did you mean 'paper'"):
        mHCLayer(hidden_dim=8, preset="papr")


def test_weights_are_found_by_name_after_they_were_registered_again():
    layer = mHCLayer(hidden_dim=8, num_flows=1)  # where alpha and bias have one shape
    torch.nn.init.normal_(layer.bias)
    expected = layer.tree()
    torch.nn.utils.parametrize.register_parametrization(layer, "alpha", torch.nn.Identity())
    torch.nn.utils.parametrize.remove_parametrizations(layer, "alpha")
    assert [*layer._parameters] == ["phi", "bias", "alpha"]
    assert all(torch.equal(*pair) for pair in zip(layer.tree(), expected, strict=True))
