"""The held-out loss by the functions of the training step."""

import pytest
import torch
from torch._dynamo.utils import counters

from rlm_mhc import fn
from rlm_mhc.config import LoraConfig
from rlm_mhc.program import head as program_head
from rlm_mhc.program import init_train_state, make_program
from rlm_mhc.program.weight_source import lora_source
from rlm_mhc.testing import assert_as_accurate, random_batch, small_config
from rlm_mhc.testing.models import double, perturbed, small_training
from rlm_mhc.train.evaluate import filled
from rlm_mhc.variants import PRESETS


def reference(params, batch, config):
    logits = fn.forward(params, batch.tokens, config)
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), batch.targets.flatten(), reduction="sum")


@pytest.mark.parametrize("remat", ["none", "mhc", "full"])
@pytest.mark.parametrize("shape", [*(dict(mhc_preset=name) for name in PRESETS), dict(mhc_enabled=False)], ids=str)
def test_it_is_the_sum_of_the_losses(shape, remat, monkeypatch):
    monkeypatch.setitem(program_head.LOGITS_AT_ONCE, "cpu", 5 * 61)  # four chunks of 18 tokens, the last one filled up
    config = small_config(**shape)
    params, batch = perturbed(fn.init(config)), random_batch(config, 2, 9, ignored=0.3)
    if remat == "mhc" and not config.mhc_enabled:
        remat = "none"
    loss_sum = make_program(config, small_training(remat=remat)).loss_sum
    exact = reference(double(params), batch, config)
    found = loss_sum(params, batch)
    assert_as_accurate(found, reference(params, batch, config), exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss_sum(params, batch), found)
    torch.testing.assert_close(loss_sum(double(params), batch), exact)


def test_no_graph_is_recorded_and_rows_without_targets_add_nothing():
    config = small_config()
    params = fn.init(config)
    for leaf in (params.norm.weight, params.embed_tokens.weight):
        leaf.requires_grad_()
    batch = random_batch(config, 1, 9)
    loss_sum = make_program(config, small_training()).loss_sum
    assert not loss_sum(params, batch).requires_grad
    torch.testing.assert_close(loss_sum(params, filled(batch, 3)), loss_sum(params, batch))


def test_a_program_of_adapters_evaluates_the_merged_model():
    config, lora = small_config(), LoraConfig(rank=2)
    base = perturbed(fn.init(config))
    trained = perturbed(fn.lora_init(base, lora))
    program = make_program(config, small_training(), weight_source=lora_source(base, trained, lora))
    merged, batch = fn.lora_merge(base, trained, lora.scale), random_batch(config, 2, 9)
    torch.testing.assert_close(program.loss_sum(merged, batch), reference(merged, batch, config))


@pytest.mark.slow
@pytest.mark.usefixtures("no_shape_checks")
def test_it_shares_what_the_step_has_compiled():
    config, training = small_config(num_layers=2, mhc_flows=2), small_training(compile=True)
    said = []
    program = make_program(config, training, on_compile=lambda *what: said.append(what))
    state, batch = init_train_state(config, training, device="cpu"), random_batch(config, 4, 9)
    torch._dynamo.reset()
    counters.clear()
    program.step(state, batch)
    before = counters["stats"]["unique_graphs"]
    small = fn.Batch(batch.tokens[:2], batch.targets[:2])
    plain = reference(state.params, small, config)
    assert_as_accurate(program.loss_sum(state.params, small), plain, reference(double(state.params), small, config))
    assert counters["stats"]["unique_graphs"] == before + 1
    program.step(state, batch)
    assert counters["stats"]["unique_graphs"] == before + 1
    names = ["embedding", "block, forward", "head and loss", "block, backward", "held-out loss"]
    assert [what[2] for what in said] == names
    assert {what[:2] for what in said} == {(number, 5) for number in range(1, 6)}
