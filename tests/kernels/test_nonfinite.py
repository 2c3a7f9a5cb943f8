"""NaN reaches the loss through every kernel: where the reference has NaN, and a step is skipped where its is."""

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
from rlm_mhc.testing.models import disturbed, with_entry
from rlm_mhc.tree import tree_leaves, tree_map


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
def test_nan_in_an_argument_is_nan_where_the_reference_has_it(name, eps, device):
    settings = Settings(2, 1e-6, eps)
    inputs = draw_inputs(name, 3, 16, 3, torch.float32, device)
    results = [*OUTPUTS[name], *(f"gradient of {key}" for key in inputs)]
    for key, x in inputs.items():
        poisoned = x.clone()
        poisoned[(1,) + (0,) * (x.dim() - 1)] = math.nan
        found = []
        for run in (fused(name, settings), reference(name, settings)):
            outputs, pull = torch.func.vjp(run, *(inputs | {key: poisoned}).values())
            found.append([*outputs, *pull(tuple(torch.ones_like(y) for y in outputs))])
        for result, actual, expected in zip(results, *found, strict=True):
            assert torch.equal(actual.isnan(), expected.isnan()), f"NaN in {key}: {result}"


CONFIG = small_config(
    hidden_dim=16,
    num_heads=1,
    num_kv_heads=1,
    ffn_dim=8,
    vocab_size=11,
    num_layers=1,
    mhc_flows=2,
    mhc_sinkhorn_iters=2,
)
MIXED = [
    *(f"layers.0.{site}.{part}" for site in ("attn_mhc", "mlp_mhc") for part in ("phi", "alpha", "bias")),
    "layers.0.input_layernorm.weight",
    "layers.0.post_attention_layernorm.weight",
    "embed_tokens.weight",
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", MIXED)
def test_a_step_is_skipped_where_that_of_the_reference_is(name, value, device):
    training = TrainConfig(batch_size=1, gradient_accumulation_steps=1, compile=False, mixed_precision="fp32")
    state = init_train_state(CONFIG, training, device=device)
    # The last entry of a bias is one of `res`. Token 0 is in the batch.
    index = 0 if name == "embed_tokens.weight" else -1
    state = state._replace(params=with_entry(disturbed(state.params), name, index, value))
    batch = tree_map(lambda x: x.to(device), random_batch(CONFIG, 1, 3))
    batch.tokens[0, 0] = 0
    steps = [make_train_step(CONFIG, training, kernels=kernels) for kernels in (fn.REFERENCE, TRITON)]
    (after, expected), (own_after, actual) = (step(state, batch) for step in steps)
    assert actual["skipped"] == expected["skipped"]
    assert actual["loss"].isfinite() == expected["loss"].isfinite()
    # An infinite logit of Sinkhorn counts as the largest.
    assert expected["skipped"] == (not (math.isinf(value) and name.endswith("mhc.bias")))
    if expected["skipped"]:
        for old, *new in zip(*map(tree_leaves, (state.params, after.params, own_after.params)), strict=True):
            assert all(torch.equal(x.nan_to_num(), old.nan_to_num()) for x in new)
