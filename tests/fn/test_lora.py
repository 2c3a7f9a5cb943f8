import pytest
import torch

from rlm_mhc import fn
from rlm_mhc.config import LORA_TARGETS, LoraConfig
from rlm_mhc.fn.lora import (
    Adapter,
    lora_decay_mask,
    lora_pull_layer,
    lora_reads,
    merge_weight,
)
from rlm_mhc.testing import assert_trees_close, random_batch, small_config
from rlm_mhc.testing.models import perturbed
from rlm_mhc.tree import named_leaves, tree_leaves, tree_map

LORA = LoraConfig(rank=3, alpha=6)


def test_new_adapters_change_nothing_and_begin_as_peft_has_it():
    base = fn.init(small_config(mhc_preset="deepseek_v4"))
    trained = fn.lora_init(base, LORA)
    assert_trees_close(fn.lora_merge(base, trained, LORA.scale), base, 0.0)
    adapter = trained.layers[1]["mlp.down_proj"]
    assert (adapter.lora_A.shape, adapter.lora_B.shape) == ((3, 48), (32, 3))
    layer = torch.nn.Linear(48, 3, bias=False)
    torch.nn.init.kaiming_uniform_(layer.weight, a=5**0.5)  # as peft does
    bound = 48**-0.5
    for uniform in (layer.weight, adapter.lora_A):
        assert 0.8 * bound < uniform.abs().max() <= bound
    assert not torch.equal(adapter.lora_A, trained.layers[0]["mlp.down_proj"].lora_A)
    assert_trees_close(fn.lora_init(base, LORA), trained, 0.0)
    assert not torch.equal(fn.lora_init(base, LORA, seed=1).layers[1]["mlp.down_proj"].lora_A, adapter.lora_A)


def test_what_is_trained_is_what_was_chosen():
    base = fn.init(small_config(mhc_preset="deepseek_v4"))
    chosen = fn.lora_init(base, LoraConfig(rank=2, targets=["v_proj", "up_proj"], train_mhc=False))
    assert list(chosen.layers[0]) == ["self_attn.v_proj", "mlp.up_proj"]
    assert chosen.head_mhc == ()
    every = fn.lora_init(base, LORA)
    assert len(every.layers[0]) == 2 + len(LORA_TARGETS)
    assert every.head_mhc[0] is not base.head_mhc[0]
    mask = named_leaves(lora_decay_mask(every))
    assert mask.keys() == named_leaves(every).keys()
    assert {name.rsplit(".", 1)[1] for name, decayed in mask.items() if decayed} == {"lora_A", "lora_B", "phi"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_merged_weight_is_the_sum_in_its_own_dtype(dtype):
    wide = torch.promote_types(dtype, torch.float32)
    weight, a, b = torch.randn(5, 7).to(dtype), torch.randn(3, 7, dtype=wide), torch.randn(5, 3, dtype=wide)
    merged = merge_weight(weight, a, b, 2.0)
    assert merged.dtype == dtype
    expected = (weight.double() + 2 * b.double() @ a.double()).to(dtype)
    torch.testing.assert_close(merged, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_pulled_gradients_are_those_of_the_change_of_variables():
    config = small_config(mhc_preset="deepseek_v4")
    base = tree_map(torch.Tensor.double, perturbed(fn.init(config)))
    trained = tree_map(torch.Tensor.double, perturbed(fn.lora_init(base, LORA)))
    batch = random_batch(config, 3, 7)
    exact = torch.func.grad(lambda own: fn.loss(fn.lora_merge(base, own, LORA.scale), batch, config))(trained)
    full = torch.func.grad(fn.loss)(fn.lora_merge(base, trained, LORA.scale), batch, config)
    for own, grads, expected in zip(trained.layers, full.layers, exact.layers, strict=True):
        read = {name: named_leaves(grads)[name] for name in lora_reads(grads, own)}
        assert_trees_close(lora_pull_layer(own, read, LORA.scale), expected, 1e-12, floor=1e-3)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank": -1}, "rank=-1: expected a number of at least 0"),
        ({"rank": 4, "alpha": 0}, "alpha=0"),
        ({"rank": 4, "targets": ["q_prj"]}, r"targets=\['q_prj'\].*did you mean 'q_proj'"),
        ({"rank": 4, "targets": []}, "targets"),
        ({"rank": 4, "targets": "q_proj"}, "expected all, or a list"),
        ({"rank": 4, "targets": [["q_proj"]]}, "expected some of"),
        ({"alpha": 32.0}, "no effect with rank=0"),
        ({"targets": ["q_proj"]}, "no effect with rank=0"),
        ({"train_mhc": False}, "no effect with rank=0"),
    ],
)
def test_wrong_values_are_named(fields, said):
    with pytest.raises(ValueError, match=said):
        LoraConfig(**fields)


def test_targets_may_be_all_and_have_one_order():
    assert LoraConfig(rank=1, targets="all") == LoraConfig(rank=1)
    assert LoraConfig(rank=1, targets=["up_proj", "q_proj"]).targets == ("q_proj", "up_proj")
    assert isinstance(Adapter(1, 2), tuple)
    assert tree_leaves(Adapter(1, 2)) == [1, 2]
