import pytest
import torch

from rlm_mhc import ModelConfig, TrainConfig, fn
from rlm_mhc.testing import random_batch, small_config
from rlm_mhc.train.plan import GIB, Plan, _activations, flops_per_token, make_plan
from rlm_mhc.tree import tree_leaves, tree_map

CPU = torch.device("cpu")


def measured_activations(config, batch):
    """Bytes that autograd really keeps for a forward, without the weights."""
    params = tree_map(lambda w: w.requires_grad_(), fn.init(config))
    weights = {w.untyped_storage().data_ptr() for w in tree_leaves(params)}
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = fn.loss(params, batch, config)
    assert loss.isfinite()
    return sum(size for pointer, size in kept.items() if pointer not in weights)


@pytest.mark.parametrize("mhc", [True, False])
def test_activations_are_what_autograd_keeps(mhc):
    config = small_config(hidden_dim=64, num_layers=4, vocab_size=200, mhc_enabled=mhc)
    planned = _activations(config, 4, 64, torch.float32)
    measured = measured_activations(config, random_batch(config, 4, 64))
    assert 0.97 <= planned / measured <= 1.15


def test_parts_add_up_and_large_models_are_refused():
    training = TrainConfig(mixed_precision="fp32", gradient_accumulation_steps=1, batch_size=1)
    plan = make_plan(small_config(), training, 64, CPU)
    count = fn.count(small_config())
    assert plan.parts["weights"] == 4 * count
    assert plan.parts["gradients"] == plan.parts["optimizer"] == 8 * count
    plan.require_memory()
    text = "\n".join(plan.lines)
    assert f"{count:,} parameters" in text
    assert "64 tokens per step" in text
    with pytest.raises(ValueError, match=r"needs about .* GiB .* smaller model"):
        Plan(*plan[:3], {"weights": 10 * GIB}, 2 * GIB, 1.0, ()).require_memory()


def test_the_largest_preset_is_planned_without_its_memory():
    plan = make_plan(ModelConfig.preset("7b"), TrainConfig(batch_size=1), 2048, CPU)
    assert sum(plan.parts.values()) > 100 * GIB


def test_operations_count_multiplied_parameters_and_attention():
    config = small_config(tie_embeddings=False, mhc_enabled=False)
    multiplied = fn.count(config) - config.vocab_size * config.hidden_dim
    assert flops_per_token(config, 10) == 6 * multiplied + 6 * 2 * 10 * 32
