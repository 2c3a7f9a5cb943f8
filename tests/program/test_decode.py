"""The compiled decoder: equal to the reference, and compiled once."""

import pytest
import torch
from torch._dynamo.utils import counters

from rlm_mhc import fn
from rlm_mhc.program import make_decoder
from rlm_mhc.testing import assert_trees_close, random_batch, small_config
from rlm_mhc.testing.models import disturbed
from rlm_mhc.variants import PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_uncompiled_it_is_the_reference(preset):
    config = small_config(mhc_preset=preset)
    params, tokens = disturbed(fn.init(config)), random_batch(config, 2, 6).tokens
    decoder = make_decoder(config, compiled=False)
    ours = decoder.prefill(params, tokens, config, fn.init_cache(config, 2, 8))
    expected = fn.prefill(params, tokens, config, fn.init_cache(config, 2, 8))
    assert_trees_close(ours, expected, 1e-5)
    ours = decoder.step(params, tokens[:, 0], config, ours[1])
    assert_trees_close(ours, fn.decode_step(params, tokens[:, 0], config, expected[1]), 1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("no_shape_checks")
def test_one_compiled_step_serves_all_positions_and_equals_the_reference():
    config = small_config(num_layers=1, mhc_flows=2)
    params, tokens, lengths = disturbed(fn.init(config)), random_batch(config, 2, 6).tokens, torch.tensor([2, 6])
    decoder = make_decoder(config)
    torch._dynamo.reset()
    counters.clear()
    logits, cache = decoder.prefill(params, tokens, config, fn.init_cache(config, 2, 16), lengths=lengths)
    expected, reference = fn.prefill(params, tokens, config, fn.init_cache(config, 2, 16), lengths=lengths)
    with torch.no_grad():
        for _ in range(10):
            token = expected.argmax(-1)
            logits, cache = decoder.step(params, token, config, cache)
            expected, reference = fn.decode_step(params, token, config, reference)
            assert_trees_close((logits, cache), (expected, reference), 1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.usefixtures("no_shape_checks")
def test_generating_again_compiles_nothing_and_gives_the_tokens_of_the_reference():
    config = small_config(num_layers=1, mhc_enabled=False)
    params, tokens = disturbed(fn.init(config)), random_batch(config, 2, 6).tokens
    decoder = make_decoder(config, cache_size=20)
    fn.generate(params, tokens, config, max_new_tokens=2, decoder=decoder)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (3, 6):
            prompt = tokens[:, :length]
            ours = fn.generate(params, prompt, config, max_new_tokens=14, decoder=decoder)
            assert torch.equal(ours.tokens, fn.generate(params, prompt, config, max_new_tokens=14).tokens)


def test_another_config_or_size_than_its_own_is_refused():
    config = small_config()
    params, tokens = fn.init(config), random_batch(config, 2, 6).tokens
    decoder = make_decoder(config, cache_size=12, compiled=False)
    with pytest.raises(ValueError, match="another"):
        fn.generate(params, tokens, config.replace(rope_theta=1.0), max_new_tokens=2, decoder=decoder)
    with pytest.raises(ValueError, match="cache_size=13"):
        fn.generate(params, tokens, config, max_new_tokens=2, decoder=decoder, cache_size=13)
    with pytest.raises(ValueError, match="room for 12"):
        fn.generate(params, tokens, config, max_new_tokens=7, decoder=decoder)
    with pytest.raises(ValueError, match="cache_size=65"):
        make_decoder(config, cache_size=65)
