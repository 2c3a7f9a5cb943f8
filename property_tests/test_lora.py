"""Adapters are a change of variables: they begin as nothing, add up, and their gradient is the weight's pulled back."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlm_mhc import fn
from rlm_mhc.config import LORA_TARGETS, LoraConfig
from rlm_mhc.fn.lora import merge_weight, pull_weight
from rlm_mhc.testing.strategies import configs
from rlm_mhc.tree import named_leaves, tree_map

sizes = st.integers(1, 6)
scales = st.floats(0.01, 64)
chosen = st.lists(st.sampled_from(LORA_TARGETS), min_size=1, unique=True)


def matrix(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(configs(), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 4), scales)
def test_new_adapters_change_nothing(config, dtype, rank, scale):
    base = fn.init(config, dtype=dtype)
    merged = fn.lora_merge(base, fn.lora_init(base, LoraConfig(rank=rank)), scale)
    assert all(named_leaves(tree_map(torch.equal, merged, base)).values())


@given(configs(num_layers=2), chosen, st.integers(0, 2**32))
def test_adapters_start_by_seed_and_name_alone(config, targets, seed):
    base = fn.init(config)
    own, all_of_them = (
        fn.lora_init(base, LoraConfig(rank=2, targets=names), seed=seed) for names in (targets, LORA_TARGETS)
    )
    own, all_of_them = named_leaves(own), named_leaves(all_of_them)
    assert all(torch.equal(leaf, all_of_them[name]) for name, leaf in own.items())
    drawn = [leaf for name, leaf in all_of_them.items() if name.endswith("lora_A")]
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


@given(sizes, sizes, sizes, scales, st.integers(0, 2**32))
def test_pulled_gradients_are_those_through_the_merged_weight(out, into, rank, scale, seed):
    weight, grad, a, b = (
        matrix(seed + i, *shape) for i, shape in enumerate([(out, into), (out, into), (rank, into), (out, rank)])
    )
    through = torch.func.grad(lambda a, b: (grad * merge_weight(weight, a, b, scale)).sum(), argnums=(0, 1))(a, b)
    torch.testing.assert_close(pull_weight(grad, a, b, scale), through, rtol=1e-12, atol=1e-12 * scale)


@given(sizes, sizes, sizes, sizes, scales, st.integers(0, 2**32))
def test_two_adapters_are_one_of_both_ranks(out, into, first, second, scale, seed):
    weight = matrix(seed, out, into)
    a, b = matrix(seed + 1, first + second, into), matrix(seed + 2, out, first + second)
    one_by_one = merge_weight(merge_weight(weight, a[:first], b[:, :first], scale), a[first:], b[:, first:], scale)
    torch.testing.assert_close(one_by_one, merge_weight(weight, a, b, scale), rtol=1e-12, atol=1e-12 * scale)
