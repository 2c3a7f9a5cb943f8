"""Weights of any layout and of any origin, and batches of any shape, into the step."""

import pytest
import torch

from rlm_mhc import fn
from rlm_mhc.config import LoraConfig
from rlm_mhc.params import Linear
from rlm_mhc.program import init_train_state, make_train_step
from rlm_mhc.program.gradients import make_gradients
from rlm_mhc.program.state import resume_train_state
from rlm_mhc.program.weight_source import lora_source
from rlm_mhc.testing import assert_trees_close, random_batch, small_config
from rlm_mhc.testing.models import double, perturbed, small_training
from rlm_mhc.tree import tree_leaves, tree_map

CONFIG = small_config()


def training(accumulation):
    """With clipping, so that gradients are divided in place."""
    return small_training(2, accumulation, max_grad_norm=0.1, scheduler={"warmup_steps": 0})


def trained(change, accumulation=1, donate=False, steps=3):
    state = init_train_state(CONFIG, training(accumulation), device="cpu")
    params = tree_map(change, state.params)
    state = resume_train_state(params, tree_map(lambda x: change(x) if x.dim() else x, state.optimizer), 0)
    step = make_train_step(CONFIG, training(accumulation), donate=donate)
    batch = random_batch(CONFIG, 2 * accumulation, 9)
    for _ in range(steps):
        state, metrics = step(state, batch)
    return params, state, metrics


def inferred(x):
    with torch.inference_mode():
        return x + 0


CHANGES = {
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "of a module": lambda x: torch.nn.Parameter(x.clone()),
    "of inference mode": inferred,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("donate", [False, True])
def test_weights_and_moments_are_trained_as_contiguous_ones(change, accumulation, donate):
    given, state, metrics = trained(CHANGES[change], accumulation, donate)
    _, exact, expected = trained(torch.clone, accumulation)
    assert_trees_close(tree_map(torch.Tensor.detach, state), exact, 1e-6)
    assert metrics["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-6)
    assert not any(value.requires_grad for value in metrics.values())
    if donate:
        assert state.params.norm.weight is given.norm.weight
    else:
        assert not any(leaf.requires_grad for leaf in tree_leaves(state))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_step_runs_in_any_mode_of_autograd(mode):
    _, exact, _ = trained(torch.clone)
    with mode():
        _, state, _ = trained(torch.clone)
    assert_trees_close(state, exact, 0.0)


def test_adapters_and_their_base_may_require_grad():
    lora = LoraConfig(rank=2)
    base = perturbed(fn.init(CONFIG))
    fresh = perturbed(fn.lora_init(base, lora))
    batch = random_batch(CONFIG, 2, 9)

    def grads(change):
        changed = tree_map(change, (base, fresh))
        weight_source = lora_source(*changed, lora)
        found = make_gradients(CONFIG, fn.REFERENCE, weight_source=weight_source)
        return found(changed[1], [batch, batch], torch.ones(()))

    ours, exact = grads(torch.nn.Parameter), grads(torch.clone)
    assert not any(g.requires_grad for g in (ours.loss, *tree_leaves(ours.grads)))
    assert_trees_close(ours.grads, exact.grads, 0.0)


def test_gradients_that_are_one_tensor_are_accumulated_apart():
    def swiglu(params, x):
        # The cotangent of a sum is that of both of its terms: autograd gives one tensor for two weights.
        both = params.gate_proj.weight + params.up_proj.weight
        return fn.linear(params.down_proj, fn.linear(Linear(both), x))

    kernels = fn.REFERENCE._replace(swiglu=swiglu)
    params, batch = double(perturbed(fn.init(CONFIG))), random_batch(CONFIG, 2, 9)
    one = torch.ones((), dtype=torch.float64)
    found = make_gradients(CONFIG, kernels)(params, [batch, batch, batch], one)
    once = make_gradients(CONFIG, kernels)(params, [batch], 3 * one)
    assert_trees_close(found.grads, once.grads, 1e-12)


def batch_of(*shape, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("tokens", "targets", "message"),
    [
        (batch_of(2, 0), batch_of(2, 0), r"tokens \[2, 0\]: expected at least one sequence and one token"),
        (batch_of(0, 9), batch_of(0, 9), r"tokens \[0, 9\]: expected at least one sequence and one token"),
        (batch_of(3, 9), batch_of(3, 9), "batch of 3 sequences: .* 2 × 1 = 2"),
        (batch_of(2), batch_of(2), r"tokens \[2\]: expected \[sequences, s\]"),
        (batch_of(2, 3, 9), batch_of(2, 3, 9), r"tokens \[2, 3, 9\]: expected \[sequences, s\]"),
        (batch_of(2, 65), batch_of(2, 65), "sequence of 65 tokens: longer than max_seq_len=64"),
        (batch_of(2, 9), batch_of(2, 8), r"targets torch\.int64 \[2, 8\]: expected int64 \[2, 9\]"),
        (batch_of(2, 9), batch_of(1, 9), r"targets torch\.int64 \[1, 9\]: expected int64 \[2, 9\]"),
        (batch_of(2, 9), batch_of(2, 9, dtype=torch.int32), r"targets torch\.int32"),
        (batch_of(2, 9, dtype=torch.float32), batch_of(2, 9), r"tokens torch\.float32 \[2, 9\]: expected int64"),
    ],
)  # fmt: skip
def test_a_batch_that_the_step_cannot_run_is_refused(tokens, targets, message):
    step = make_train_step(CONFIG, training(1))
    with pytest.raises(ValueError, match=message):
        step(init_train_state(CONFIG, training(1), device="cpu"), fn.Batch(tokens, targets))


def test_int32_tokens_are_trained_on():
    batch = random_batch(CONFIG, 2, 9)
    state = init_train_state(CONFIG, training(1), device="cpu")
    step = make_train_step(CONFIG, training(1))
    exact, ours = step(state, batch), step(state, batch._replace(tokens=batch.tokens.int()))
    assert_trees_close(ours[0], exact[0], 0.0)


def test_a_transform_of_the_step_is_refused():
    batch, state = random_batch(CONFIG, 2, 9), init_train_state(CONFIG, training(1), device="cpu")
    step = make_train_step(CONFIG, training(1))
    with pytest.raises(ValueError, match=r"differentiate fn\.loss and fn\.adamw"):
        torch.func.grad(lambda params: step(state._replace(params=params), batch)[0].params.norm.weight.sum())(
            state.params
        )
