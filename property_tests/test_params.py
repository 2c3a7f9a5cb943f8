"""What is true of the weights of every model before any training."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlm_mhc import fn
from rlm_mhc.params import cast, count, decay_mask, names
from rlm_mhc.testing.strategies import configs
from rlm_mhc.tree import named_leaves, tree_map

narrow = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@given(configs())
def test_matrices_decay_and_nothing_else(config):
    mask = named_leaves(decay_mask(config))
    assert mask == {name: weight.dim() == 2 for name, weight in named_leaves(fn.init(config, device="meta")).items()}


@given(configs(), narrow)
def test_mhc_weights_stay_wide_in_any_compute_dtype(config, dtype):
    for params in (fn.init(config, dtype=dtype), cast(fn.init(config), config, dtype)):
        for name, weight in named_leaves(params).items():
            assert weight.dtype == (torch.float32 if "mhc" in name else dtype)


@given(configs(), narrow, st.integers(0, 2**32))
def test_initial_values_are_those_of_the_seed_in_any_dtype(config, dtype, seed):
    params, again = fn.init(config, seed=seed), fn.init(config, seed=seed, dtype=dtype)
    assert all(named_leaves(tree_map(torch.equal, cast(params, config, dtype), again)).values())


@given(configs())
def test_names_and_number_of_weights_are_those_of_the_tree(config):
    named = named_leaves(fn.init(config, device="meta"))
    assert names(config) == list(named)
    assert count(config) == sum(weight.numel() for weight in named.values())
    assert not config.mhc_enabled or "layers.0.attn_mhc.phi" in named
