"""The program with the fused mixing computes the gradient of `fn.loss`, in Triton's interpreter or on a GPU."""

import pytest
import torch

from rlm_mhc import fn
from rlm_mhc.kernels.mixing import TRITON
from rlm_mhc.program.functions import make_functions
from rlm_mhc.program.gradients import make_gradients
from rlm_mhc.stage import Stage, Staged
from rlm_mhc.testing import assert_as_accurate, random_batch, small_config
from rlm_mhc.testing.models import double, perturbed
from rlm_mhc.tree import tree_map


def case(device, dtype=torch.float32, **fields):
    """A config, weights and a batch on the device, and on the CPU the gradients in the dtype and in float64."""
    config = small_config(mhc_sinkhorn_iters=2, **fields)
    params = fn.cast(perturbed(fn.init(config)), config, dtype)
    batch = random_batch(config, 2, 7, ignored=0.3)
    plain, exact = (torch.func.grad(fn.loss)(p, batch, config) for p in (params, double(params)))
    on_device = tree_map(lambda w: w.to(device), params)
    return config, on_device, fn.Batch(*(x.to(device) for x in batch)), plain, exact


def of_program(config, params, batch, kernels=TRITON, **options):
    gradients = make_gradients(config, kernels, **options)
    return gradients(params, [batch], 1 / fn.count_targets(batch.targets).clamp(min=1))


def on_cpu(tree):
    return tree_map(lambda x: x.cpu(), tree)


@pytest.mark.parametrize(
    ("preset", "remat"),
    [("paper", "none"), ("paper", "mhc"), ("deepseek_v4", "full"), ("single_pass", "none"), ("single_pass", "mhc")],
)
def test_program_gradients_equal_those_of_the_loss(preset, remat, device):
    config, params, batch, plain, exact = case(device, mhc_preset=preset, num_layers=2, mhc_flows=3)
    result = of_program(config, params, batch, remat=remat)
    assert_as_accurate(on_cpu(result.grads), plain, exact)
    sampled = (of_program(config, p, batch, fn.REFERENCE, remat=remat).sampled for p in (params, double(params)))
    assert_as_accurate(*(on_cpu(tree) for tree in (result.sampled, *sampled)))


@pytest.mark.parametrize("preset", ["paper", "single_pass"])
def test_the_functions_take_it_too(preset, device):
    config, params, batch, plain, exact = case(device, mhc_preset=preset, num_layers=1)

    def loss(params):
        logits = fn.forward(params, batch.tokens, config, TRITON)
        return fn.token_loss_sum(logits, batch.targets) / fn.count_targets(batch.targets)

    assert_as_accurate(on_cpu(torch.func.grad(loss)(params)), plain, exact)
    ways = ((params, TRITON), (params, fn.REFERENCE), (double(params), fn.REFERENCE))
    assert_as_accurate(*(on_cpu(fn.backbone(p, batch.tokens, config, kernels)) for p, kernels in ways))


@pytest.mark.slow
@pytest.mark.usefixtures("no_shape_checks")
def test_compiled_program_gradients_equal_those_of_the_loss(device):
    config, params, batch, plain, exact = case(device, num_layers=2)
    result = of_program(config, params, batch, compiled=True)
    assert_as_accurate(on_cpu(result.grads), plain, exact)


def test_a_swiglu_of_another_kind_gets_a_normed_input(device):
    config, params, batch, plain, exact = case(device, num_layers=1)
    own = TRITON._replace(swiglu=lambda *inputs: fn.swiglu(*inputs))
    assert_as_accurate(on_cpu(of_program(config, params, batch, own).grads), plain, exact)


def test_attention_by_two_halves_goes_with_it(device):
    config, params, batch, _, _ = case(device, num_layers=1)
    calls = []

    def forward(weights, qkv):
        calls.append("forward")
        return fn.causal_attention(*qkv), ()

    def backward(weights, qkv, saved, g):
        calls.append("backward")
        return {}, torch.func.vjp(fn.causal_attention, *qkv)[1](g)

    own = TRITON._replace(attention=Staged(fn.causal_attention, Stage(forward, backward)))
    of_program(config, params, batch, own)
    assert calls == ["forward", "backward"]


def test_bf16_is_near_the_reference(device):
    config, params, batch, plain, exact = case(device, torch.bfloat16, num_layers=2)
    assert_as_accurate(on_cpu(of_program(config, params, batch).grads), plain, exact)


def test_a_model_that_it_does_not_serve_is_refused():
    for fields in (dict(mhc_preset="hc"), dict(hidden_dim=24, num_heads=2), dict(mhc_sinkhorn_iters=65)):
        config = small_config(**fields)
        with pytest.raises(ValueError, match="do not serve this model"):
            make_functions(config, TRITON, "none")
    make_functions(small_config(mhc_enabled=False), TRITON, "none")
