import torch
from hypothesis import given
from hypothesis import strategies as st

from rlm_mhc import ModelConfig, fn
from rlm_mhc.convert.fields import ours_from_fields, theirs_from_config
from rlm_mhc.convert.gates import closed_specs
from rlm_mhc.convert.layouts import ARCHITECTURES, ours_from_names, theirs_from_names
from rlm_mhc.convert.plain import reading_errors, site_names
from rlm_mhc.params import names, weight_table
from rlm_mhc.testing import largest_difference, random_batch
from rlm_mhc.testing.strategies import configs
from rlm_mhc.tree import from_named, named_leaves, tree_map
from rlm_mhc.variants import PRESETS

seeds = st.integers(0, 2**32)
connected = configs(mhc_enabled=True).filter(lambda config: config.mhc_flows > 1)


def upcycled(config, seed):
    """A plain transformer with weights far from their initial ones, and the same with closed hyper-connections."""
    generator = torch.Generator().manual_seed(seed)
    plain = fn.init(config.replace(mhc_enabled=False), dtype=torch.float64)
    plain = tree_map(lambda w: w + 0.3 * torch.randn(w.shape, generator=generator, dtype=w.dtype), plain)
    made = {name: spec.init(name, seed, "cpu", torch.float64) for name, spec in closed_specs(config).items()}
    return plain, from_named(weight_table(config), named_leaves(plain) | made)


@given(connected, seeds)
def test_closed_hyper_connections_leave_the_plain_transformer(config, seed):
    plain, params = upcycled(config, seed)
    tokens = random_batch(config, 2, 6, seed=seed).tokens
    expected = fn.forward(plain, tokens, config.replace(mhc_enabled=False))
    assert largest_difference(fn.forward(params, tokens, config), expected) < 1e-4
    named = named_leaves(params)
    errors = [error for _, error in reading_errors({k: named[f"{k}.bias"] for k in site_names(config)}, config)]
    assert max(errors) < (1e-12 if PRESETS[config.mhc_preset].eps == 0 else 2e-6 * (1 + 2 * config.num_layers))


@given(connected, seeds)
def test_what_a_sub_layer_reads_is_counted_as_the_model_computes_it(config, seed):
    plain, params = upcycled(config, seed)
    bias = params.layers[-1].mlp_mhc.bias
    bias.add_(torch.linspace(0.1, 0.3, len(bias), dtype=bias.dtype))
    named = named_leaves(params)
    *_, last = reading_errors({site: named[f"{site}.bias"] for site in site_names(config)}, config)
    tokens = random_batch(config, 2, 6, seed=seed).tokens
    expected = fn.forward(plain, tokens, config.replace(mhc_enabled=False))
    assert last[1] > 1e-3
    assert largest_difference(fn.forward(params, tokens, config), expected) > 1e-7


@given(configs().filter(lambda config: not (config.qkv_bias and config.qk_norm)))
def test_names_and_fields_survive_the_way_to_another_layout_and_back(config):
    config = config.replace(mhc_enabled=False)
    kind, fields = theirs_from_config(config)
    theirs = theirs_from_names(names(config), ARCHITECTURES[kind])
    assert ours_from_names(theirs.values(), ARCHITECTURES[kind], "") == {their: our for our, their in theirs.items()}
    mhc = {name: getattr(config, name) for name in vars(config) if name.startswith("mhc_")}
    assert ModelConfig(**ours_from_fields(fields, ""), **mhc) == config
