"""NaN reaches the loss through every kernel: where the reference has NaN, and a step is skipped where its is."""

import functools
import math

import pytest
import torch

from rlm_mhc import TrainConfig, fn
from rlm_mhc.kernels.mix_pre import Settings
from rlm_mhc.kernels.mixing import TRITON
from rlm_mhc.kernels.selftest import ARGUMENTS, OUTPUTS, draw_inputs, fused, reference
from rlm_mhc.kernels.sinkhorn import op
from rlm_mhc.program import init_train_state, make_train_step
from rlm_mhc.testing import random_batch, small_config
from rlm_mhc.testing.models import perturbed, with_entry
from rlm_mhc.tree import named_leaves, tree_leaves, tree_map
from rlm_mhc.variants import PRESETS


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_makes_its_whole_matrix_and_the_gradient_of_it_nan_and_no_other(dtype, eps):
    for n in (1, 2, 3, 4):
        for entry in range(n * n):
            logits, cotangent = torch.randn(2, 20, n, n, dtype=dtype).unbind()
            logits[7].view(-1)[entry] = math.nan
            expected = torch.arange(20) == 7
            out, pull = torch.func.vjp(lambda x: fn.sinkhorn_knopp(x, num_iters=3, eps=eps), logits)
            found = [out, *pull(cotangent), op.sinkhorn(logits, 3, eps), op.plain(logits, 3, eps)]
            found += [run(logits, cotangent, 3, eps) for run in (op.sinkhorn_backward, op.plain_backward)]
            for x in found:
                assert torch.equal(x.isnan().all((-1, -2)), expected)
                assert torch.equal(x.isnan().any((-1, -2)), expected)


@pytest.mark.parametrize(("name", "eps"), [*((name, 0.0) for name in ARGUMENTS), ("mix_pre", 1e-6)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_argument_that_is_not_finite_gives_nan_where_the_reference_has_it(name, eps, value, device):
    settings = Settings(2, 1e-6, eps)
    inputs = draw_inputs(name, 3, 16, 3, torch.float32, device)
    results = [*OUTPUTS[name], *(f"gradient of {key}" for key in inputs)]
    for key, x in inputs.items():
        poisoned = x.clone()
        poisoned[(1,) + (0,) * (x.dim() - 1)] = value
        found = []
        for run in (fused(name, settings), reference(name, settings)):
            outputs, pull = torch.func.vjp(run, *(inputs | {key: poisoned}).values())
            found.append([*outputs, *pull(tuple(torch.ones_like(y) for y in outputs))])
        for result, actual, expected in zip(results, *found, strict=True):
            # An infinite gate has the derivative 0, or 0 · inf: in one of the gradients, not the same in both.
            if math.isnan(value) or result in OUTPUTS[name]:
                assert torch.equal(actual.isnan(), expected.isnan()), f"{value} in {key}: {result}"
        finite = [all(bool(x.isfinite().all()) for x in run) for run in found]
        assert finite[0] == finite[1], f"{value} in {key}"


SINKHORN = [name for name, preset in PRESETS.items() if preset.projection == "sinkhorn"]
TRAINING = TrainConfig(batch_size=1, gradient_accumulation_steps=1, compile=False, mixed_precision="fp32")


@functools.cache
def prepared(preset, device):
    """Return the config of a preset, its state, and two steps, by the reference and by Triton's kernels."""
    shape = dict(hidden_dim=16, num_heads=1, num_kv_heads=1, ffn_dim=8, vocab_size=11, num_layers=1)
    config = small_config(**shape, mhc_flows=2, mhc_sinkhorn_iters=2, mhc_preset=preset)
    state = init_train_state(config, TRAINING, device=device)
    steps = [make_train_step(config, TRAINING, kernels=kernels) for kernels in (fn.REFERENCE, TRITON)]
    return config, state._replace(params=perturbed(state.params)), steps


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("preset", SINKHORN)
def test_a_step_is_skipped_where_that_of_the_reference_is(preset, value, device):
    config, clean, steps = prepared(preset, device)
    batch = tree_map(lambda x: x.to(device), random_batch(config, 1, 3))
    batch.tokens[0, 0] = 0
    skipped = set()
    for name in named_leaves(clean.params):
        # The last entry of a bias is one of `res`. Token 0 is in the batch.
        index = 0 if name == "embed_tokens.weight" else -1
        state = clean._replace(params=with_entry(clean.params, name, index, value))
        (after, expected), (own_after, actual) = (step(state, batch) for step in steps)
        assert actual["skipped"] == expected["skipped"], name
        assert actual["loss"].isfinite() == expected["loss"].isfinite(), name
        if expected["skipped"]:
            skipped.add(name)
            for old, *new in zip(*map(tree_leaves, (state.params, after.params, own_after.params)), strict=True):
                assert all(torch.equal(x.nan_to_num(), old.nan_to_num()) for x in new), name
    # An infinite logit of Sinkhorn counts as the largest.
    biases = {name for name in named_leaves(clean.params) if math.isinf(value) and name.endswith("mhc.bias")}
    assert skipped == set(named_leaves(clean.params)) - biases
