"""Compiled functions check everything that may change between calls: arguments, their aliasing, PyTorch's state."""

import contextlib
import functools

import pytest
import torch
from torch.autograd import forward_ad

from rlm_mhc import TrainConfig, fn
from rlm_mhc.params import RMSNorm
from rlm_mhc.program import decode, functions, init_train_state, make_decoder, make_train_step
from rlm_mhc.program.compile import compile_whole
from rlm_mhc.testing import assert_trees_close, random_batch, small_config
from rlm_mhc.testing.models import perturbed

pytestmark = pytest.mark.usefixtures("no_shape_checks")
compile_eagerly = functools.partial(compile_whole, backend="eager")


def test_a_first_call_with_one_tensor_twice_does_not_make_two_tensors_one():
    run = compile_eagerly(lambda a, b: a - 2 * b)
    a, b = torch.tensor(5.0), torch.tensor(7.0)
    assert [run(a, a), run(a, b), run(b, a), run(b, b)] == [-5, -9, -3, -7]


def test_an_argument_that_is_in_a_closure_too_is_not_taken_for_it():
    closed = torch.tensor(5.0)
    run = compile_eagerly(lambda a: a - 2 * closed)
    assert [run(closed), run(torch.tensor(7.0)), run(closed)] == [-5, -3, -5]


def test_arguments_that_are_no_tensors_are_checked():
    run = compile_eagerly(lambda xs, act, k=1: act(sum(xs)) * k)
    x = torch.tensor(-1.0)
    assert [run([x], torch.abs), run([x, x], torch.abs), run([x], torch.sign), run([x], torch.abs, 3)] == [1, 2, -1, 3]


def test_defaults_of_keywords_stay():
    def f(a, *, k=3):
        return a * k

    run = compile_eagerly(f)
    assert [run(torch.tensor(1.0)), run(torch.tensor(1.0), k=2)] == [3, 2]


@contextlib.contextmanager
def changed(read, write, value):
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def attribute(owner, name, value):
    return changed(lambda: getattr(owner, name), lambda new: setattr(owner, name, new), value)


STATES = {
    "default dtype": (
        lambda x: torch.zeros(2),
        lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    ),
    "default device": (lambda x: torch.zeros(2), lambda: torch.device("meta")),
    "autocast": (lambda x: x @ x, lambda: torch.autocast("cpu", torch.bfloat16)),
    "grad mode": (lambda x: x + torch.is_grad_enabled(), torch.no_grad),
    "deterministic": (
        lambda x: x + torch.are_deterministic_algorithms_enabled(),
        lambda: changed(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
    ),
    "forward mode": (lambda x: x + forward_ad._current_level, forward_ad.dual_level),
    "fill": (
        lambda x: x + torch.utils.deterministic.fill_uninitialized_memory,
        lambda: attribute(torch.utils.deterministic, "fill_uninitialized_memory", False),
    ),
    "cudnn": (
        lambda x: x + torch.backends.cudnn.enabled,
        lambda: attribute(torch.backends.cudnn, "enabled", not torch.backends.cudnn.enabled),
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_state_of_pytorch_is_checked(state):
    f, change = STATES[state]
    run, x = compile_eagerly(f), torch.eye(2)
    for context in (contextlib.nullcontext(), change(), contextlib.nullcontext()):
        with context:
            actual, expected = run(x), f(x)
        assert (actual.dtype, actual.device) == (expected.dtype, expected.device)
        assert actual.is_meta or torch.equal(actual, expected)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.vmap])
def test_calls_inside_and_outside_of_transforms_do_not_mix(transform):
    run, x = compile_eagerly(lambda x: (x * x).sum()), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for f in (lambda f: f, transform, lambda f: f):
        torch.testing.assert_close(f(run)(x), f(lambda x: (x * x).sum())(x))


def shared_norms(params):
    """`params` whose norms of one width are one tensor."""
    one = RMSNorm(torch.ones_like(params.norm.weight))
    layers = tuple(x._replace(input_layernorm=one, post_attention_layernorm=one) for x in params.layers)
    return params._replace(layers=layers, norm=one)


def test_a_train_step_whose_first_weights_share_tensors_equals_the_uncompiled_one(monkeypatch):
    monkeypatch.setattr(functions, "compile_whole", compile_eagerly)
    config = small_config(num_layers=1, mhc_flows=2, mhc_sinkhorn_iters=1)
    batch, results = random_batch(config, 2, 7), []
    for compiled in (True, False):
        training = TrainConfig(batch_size=2, gradient_accumulation_steps=1, compile=compiled, mixed_precision="fp32")
        state = init_train_state(config, training, device="cpu")
        state = state._replace(params=shared_norms(perturbed(state.params)))
        step = make_train_step(config, training)
        for _ in range(2):
            state, metrics = step(state, batch)
            # Noise, so that weights which take each other's place are far from each other.
            state = state._replace(params=perturbed(state.params))
        results.append((state.params, metrics["loss"]))
    assert_trees_close(results[0], results[1], 1e-5)


def test_a_decoder_whose_first_weights_share_tensors_equals_the_uncompiled_one(monkeypatch):
    monkeypatch.setattr(decode, "compile_whole", compile_eagerly)
    config = small_config(num_layers=1, mhc_flows=1, mhc_sinkhorn_iters=1)
    params, token = perturbed(fn.init(config)), torch.tensor([1, 2])
    run, plain = make_decoder(config), make_decoder(config, compiled=False)
    for weights in (shared_norms(params), params):
        logits = [d.extend(weights, token.unsqueeze(-1), config, fn.init_cache(config, 2, 8))[0] for d in (run, plain)]
        torch.testing.assert_close(*logits)
