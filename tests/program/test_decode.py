"""The compiled decoder: equal to the reference, and compiled once."""

import pytest
import torch
from torch._dynamo.utils import counters

from rlm_mhc import fn
from rlm_mhc.program import make_decoder
from rlm_mhc.testing import assert_as_accurate, random_batch, small_config
from rlm_mhc.testing.models import double, perturbed
from rlm_mhc.variants import PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_uncompiled_it_is_the_reference(preset):
    config = small_config(mhc_preset=preset)
    params, tokens = perturbed(fn.init(config)), random_batch(config, 2, 6).tokens
    decoder = make_decoder(config, compiled=False)
    empty, wide = fn.init_cache(config, 2, 8), double(params)
    ours = decoder.prefill(params, tokens, config, empty)
    plain, exact = fn.prefill(params, tokens, config, empty), fn.prefill(wide, tokens, config, double(empty))
    assert_as_accurate(ours, plain, exact)
    ours = decoder.extend(params, tokens[:, :1], config, ours[1])
    plain, exact = (fn.decode_step(p, tokens[:, 0], config, c) for p, c in ((params, plain[1]), (wide, exact[1])))
    assert_as_accurate(ours, plain, exact)


@pytest.mark.slow
@pytest.mark.usefixtures("no_shape_checks")
def test_one_compiled_step_serves_all_positions_and_equals_the_reference():
    config = small_config(num_layers=1, mhc_flows=2)
    params, tokens, lengths = perturbed(fn.init(config)), random_batch(config, 2, 6).tokens, torch.tensor([2, 6])
    decoder = make_decoder(config)
    torch._dynamo.reset()
    counters.clear()
    empty, wide = fn.init_cache(config, 2, 16), double(params)
    ours, plain = (read(params, tokens, config, empty, lengths=lengths) for read in (decoder.prefill, fn.prefill))
    exact = fn.prefill(wide, tokens, config, double(empty), lengths=lengths)
    with torch.no_grad():
        for _ in range(10):
            token = exact[0].argmax(-1)
            ours = decoder.extend(params, token.unsqueeze(-1), config, ours[1])
            plain, exact = (fn.decode_step(p, token, config, c) for p, c in ((params, plain[1]), (wide, exact[1])))
            assert_as_accurate(ours, plain, exact)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.usefixtures("no_shape_checks")
def test_generating_again_compiles_nothing_and_gives_the_tokens_of_the_reference():
    config = small_config(num_layers=1, mhc_enabled=False)
    params, tokens = perturbed(fn.init(config)), random_batch(config, 2, 6).tokens
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
