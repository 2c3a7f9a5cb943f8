"""What promises fp32 has it under `torch.autocast` too, and so have its derivatives, whose products run under the
autocast of whoever asks for them."""

import importlib.util
import sys

import pytest
import torch
from torch.utils import _pytree as pytree

from rlm_mhc import TrainConfig, fn
from rlm_mhc.fn.clip import leaf_norms
from rlm_mhc.fn.lora import merge_weight, pull_weight
from rlm_mhc.fn.product import product
from rlm_mhc.kernels.sinkhorn import mhc_mappings_by_op, sinkhorn_knopp
from rlm_mhc.program import init_train_state, make_train_step
from rlm_mhc.program.hyper import mappings_stage
from rlm_mhc.testing import largest_difference, random_batch, small_config
from rlm_mhc.testing.models import perturbed
from rlm_mhc.tree import named_leaves, tree_leaves
from rlm_mhc.variants import PRESETS, PROJECTIONS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(preset):
    return perturbed(fn.init(small_config(mhc_preset=preset)))


def of_mappings(run, preset):
    def mapped(streams, *params):
        return tuple(run(fn.MHCParams(*params), streams, preset=preset))

    return mapped, (normal(3, 4, 32), *weights(preset).layers[0].attn_mhc)


def of_projection(name):
    n = 4 if PROJECTIONS[name].fits(4) else 2
    return lambda raw: fn.project(raw, n, name), (normal(5, PROJECTIONS[name].raw_size(n)),)


def cases():
    for preset in PRESETS:
        yield f"mappings of {preset}", *of_mappings(fn.mhc_mappings, preset)
    yield "mappings by op", *of_mappings(mhc_mappings_by_op, "paper")
    for name in PROJECTIONS:
        yield name, *of_projection(name)
    logits, res = normal(5, 4, 4), fn.sinkhorn_knopp(normal(6, 3, 4, 4))
    yield "sinkhorn_implicit", fn.sinkhorn_implicit, (logits,)
    yield "sinkhorn by op", sinkhorn_knopp, (logits,)
    yield "composite gain", fn.composite_gain, (res,)
    yield "cumulative gain", fn.cumulative_gain, (res,)
    yield "stochasticity error", fn.stochasticity_error, (res,)
    yield "dominance", fn.stream_dominance, (normal(5, 4, 8),)
    head = weights("deepseek_v4").head_mhc
    yield "learned collapse", lambda x, *w: fn.collapse_learned(fn.MHCHead(*w), x), (normal(3, 4, 32), *head)
    yield "aggregate", fn.mhc_aggregate, (normal(3, 4, 8), normal(3, 4, seed=1))
    yield "combine", fn.mhc_combine, (normal(3, 4, 8), normal(3, 8), normal(3, 4), res[0])
    yield "collapse", fn.collapse_streams, (normal(3, 4, 8),)
    yield "norm", fn.rms_norm, (normal(3, 8), normal(8, seed=1))
    cos, sin = fn.rotary_table(torch.arange(5), 8)
    yield "rotary embedding", lambda x: fn.rotary_embedding(x, cos, sin), (normal(2, 5, 8),)
    yield "loss", lambda x: fn.token_loss_sum(x, torch.tensor([1, 2, -100])), (normal(3, 8),)
    yield "merged weight", lambda *x: merge_weight(*x, 0.5), (normal(6, 8), normal(2, 8), normal(6, 2))
    yield "pulled weight", lambda *x: pull_weight(*x, 0.5), (normal(6, 8), normal(2, 8), normal(6, 2))
    yield "clipping", lambda x: fn.clip_by_global_norm((x,), 0.1), (normal(50),)
    yield "norms", lambda x: leaf_norms((x,)), (normal(5000),)
    yield "logits", lambda x: fn.filter_logits(x, fn.Sampling(temperature=0.7, top_p=0.9)), (normal(2, 9),)
    yield "schedule", lambda t: fn.cosine_schedule(t, lr=0.1, warmup_steps=2, max_steps=9), (torch.tensor(5.0),)


CASES = {name: (run, inputs) for name, run, inputs in cases()}


def derivatives(run, inputs, order):
    """Outputs, cotangents of the inputs by `torch.func` and by plain autograd, and second derivatives."""
    outputs, pull = torch.func.vjp(run, *inputs)
    by_func = pull(pytree.tree_map(lambda y: torch.cos(y.detach()).nan_to_num(), outputs))
    leaves = [x.clone().requires_grad_() for x in inputs]
    flat = [y for y in pytree.tree_leaves(run(*leaves)) if y.requires_grad]
    how = dict(allow_unused=True, materialize_grads=True)
    cotangents = [torch.cos(y.detach()).nan_to_num() for y in flat]
    plain = torch.autograd.grad(flat, leaves, cotangents, create_graph=order > 1, **how)
    curved = [g.square().sum() for g in plain if g.requires_grad]
    second = torch.autograd.grad(sum(curved), leaves, **how) if curved else ()
    return outputs, by_func, [g.detach() for g in plain], second


def assert_same(actual, expected, tolerance=1e-6):
    pairs = list(zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True))
    assert pairs
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype
        finite = theirs.isfinite()
        assert torch.equal(finite, ours.isfinite())
        assert largest_difference(ours[finite], theirs[finite]) <= tolerance


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_autocast_changes_neither_a_value_nor_a_derivative(name, device):
    run, inputs = CASES[name]
    if device == "cuda" and (not torch.cuda.is_available() or name in ("loss", "rotary embedding")):
        pytest.skip("no CUDA device, or a constant on the CPU")
    inputs = [x.to(device) for x in inputs]
    order = 1 if name.endswith("by op") else 2
    expected = derivatives(run, inputs, order)
    with torch.autocast(device, torch.bfloat16):
        actual = derivatives(run, inputs, order)
    assert_same(actual, expected)


@pytest.mark.parametrize("transform", ["jvp", "jacfwd of jacfwd", "hvp", "vmap of grad", "grad of jvp"])
@pytest.mark.parametrize("name", ["mappings of paper", "permutations"])
def test_autocast_changes_no_transform(name, transform):
    run, (x, *rest) = CASES[name]

    def f(x):
        return sum(y.square().sum() for y in pytree.tree_leaves(run(x, *rest)))

    transforms = {
        "jvp": lambda x: torch.func.jvp(run, (x, *rest), (x.cos(), *rest)),
        "jacfwd of jacfwd": lambda x: torch.func.jacfwd(torch.func.jacfwd(lambda t: f(x + t)))(torch.tensor(0.1)),
        "hvp": lambda x: torch.func.jvp(torch.func.grad(f), (x,), (x.cos(),))[1],
        "vmap of grad": torch.func.vmap(torch.func.grad(f)),
        "grad of jvp": torch.func.grad(lambda x: torch.func.jvp(f, (x,), (x.cos(),))[1]),
    }
    expected = transforms[transform](x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = transforms[transform](x)
    assert_same(actual, expected, 2e-6)


@pytest.mark.parametrize("shapes", [((2, 5, 3), (3, 4)), ((2, 5, 3), (2, 3, 4)), ((3,), (3, 4))], ids=str)
def test_autocast_changes_no_compiled_gradient(shapes, monkeypatch):
    # Dynamo does not get through the shape hook inside a Function: the module once more, without it.
    spec = importlib.util.spec_from_file_location("unchecked_product", sys.modules[product.__module__].__file__)
    unchecked = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, unchecked)
    spec.loader.exec_module(unchecked)

    def f(a, b):
        return torch.sin(unchecked.product(a, b)).square().sum()

    inputs = [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    grads = torch.func.grad(f, argnums=(0, 1))
    expected = grads(*inputs)
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(torch.compile(grads, fullgraph=True, backend="aot_eager")(*inputs), expected)
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves)
        assert_same(torch.autograd.grad(value, leaves), expected)


def test_derivatives_under_autocast_are_those_of_finite_differences():
    a, b = normal(2, 3, 3).double() + 4 * torch.eye(3, dtype=torch.float64), normal(2, 3, 3).double()
    inputs = a.requires_grad_(), b.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.autograd.gradcheck(product, inputs)
        assert torch.autograd.gradgradcheck(product, inputs)
        flat = normal(5, 3).double().requires_grad_(), b[0].detach().requires_grad_()
        assert torch.autograd.gradgradcheck(product, flat)


@pytest.mark.parametrize("preset", ["paper", "lite", "single_pass"])
def test_the_mappings_of_the_program_stay_fp32(preset):
    config = small_config(mhc_preset=preset)
    params, x = weights(preset).layers[0], normal(3, 4, 32)
    stage, named = mappings_stage("attn_mhc", config, fn.REFERENCE), named_leaves(params)

    def both():
        mappings, kept = stage.forward(named, x)
        return mappings, stage.backward(named, x, kept, type(mappings)(*map(torch.cos, mappings)))

    expected = both()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(both(), expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_runs_in_its_own_precision(precision):
    config = small_config(mhc_preset="lite")
    training = TrainConfig(batch_size=2, gradient_accumulation_steps=2, mixed_precision=precision, compile=False)
    state, batch = init_train_state(config, training, device="cpu"), random_batch(config, 4, 9)
    step = make_train_step(config, training)
    expected = step(state, batch)
    with torch.autocast("cpu", torch.bfloat16):
        actual = step(state, batch)
    assert all(map(torch.equal, tree_leaves(actual), tree_leaves(expected)))
