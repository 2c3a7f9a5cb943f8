import dataclasses
from types import SimpleNamespace

import pytest
import torch

from rlm_mhc import ModelConfig, TrainConfig, fn
from rlm_mhc.checkpoint import snapshot
from rlm_mhc.config import LoraConfig
from rlm_mhc.program import init_train_state, make_program, make_train_step
from rlm_mhc.testing import random_batch, small_config
from rlm_mhc.testing.memory import peak_bytes
from rlm_mhc.train.evaluate import evaluate
from rlm_mhc.train.plan import GIB, Plan, epoch_lines, flops_per_token, make_plan
from rlm_mhc.train.run_config import RunConfig
from rlm_mhc.tree import size, size_bytes

CPU = torch.device("cpu")
REMAT = ("none", "mhc", "full")


def test_parts_add_up_and_large_models_are_refused():
    training = TrainConfig(mixed_precision="fp32", gradient_accumulation_steps=1, batch_size=1)
    plan = make_plan(small_config(), training, 64, CPU)
    count = fn.count(small_config())
    assert plan.parts["weights"] == 4 * count
    assert plan.parts["gradients"] == 4 * count
    assert plan.parts["optimizer"] == 8 * count
    plan.require_memory()
    text = "\n".join(plan.lines)
    assert f"{count:,} parameters" in text
    assert "64 tokens per step" in text
    with pytest.raises(ValueError, match=r"needs about .* GiB .* smaller model"):
        Plan(*plan[:3], {"weights": 10 * GIB}, 2 * GIB, 1.0, ()).require_memory()


def test_the_largest_preset_is_planned_without_its_memory():
    plan = make_plan(ModelConfig.preset("7b"), TrainConfig(batch_size=1), 2048, CPU)
    assert sum(plan.parts.values()) > 100 * GIB


def test_what_may_not_fit_is_warned_of_and_what_cannot_is_refused():
    plan = make_plan(small_config(), TrainConfig(), 64, CPU)
    needed = sum(plan.parts.values())
    plan._replace(available=int(0.95 * needed)).require_memory()
    with pytest.raises(ValueError, match="needs about"):
        plan._replace(available=int(0.85 * needed)).require_memory()


def test_recomputation_lowers_the_plan():
    config = small_config(hidden_dim=128, num_layers=8)
    plans = {remat: make_plan(config, TrainConfig(remat=remat), 64, CPU).parts["activations"] for remat in REMAT}
    assert plans["full"] < plans["mhc"] < plans["none"]


def test_adapters_need_weights_once_and_little_else():
    config = small_config(hidden_dim=128, num_layers=8)
    training = TrainConfig(mixed_precision="bf16", batch_size=1)
    full, lora = (make_plan(config, training, 64, CPU, lora=own) for own in (None, LoraConfig(rank=4)))
    base = fn.cast(fn.init(config), config, torch.bfloat16)
    trained = size(fn.lora_init(base, LoraConfig(rank=4)))
    assert lora.parts["weights"] == size_bytes(base) + 4 * trained
    assert lora.parts["optimizer"] == 8 * trained
    assert lora.parts["gradients"] == 4 * trained
    assert full.parts["weights"] > 1.5 * lora.parts["weights"]
    assert lora.parts["activations"] >= size_bytes(base.layers)
    assert any(line.startswith(f"trained      {trained:,} parameters") for line in lora.lines)
    wide = small_config(num_layers=1, vocab_size=50_000)
    full, lora = (make_plan(wide, training, 8, CPU, lora=own) for own in (None, LoraConfig(rank=4)))
    # Without a gradient of the embedding.
    assert lora.parts["activations"] < 4 * 50_000 * 32 < full.parts["activations"]


def test_operations_count_multiplied_parameters_and_attention():
    config = small_config(tie_embeddings=False, mhc_enabled=False)
    multiplied = fn.count(config) - config.vocab_size * config.hidden_dim
    assert flops_per_token(config, 10) == 6 * multiplied + 6 * 2 * 10 * 32


@pytest.mark.parametrize(("warmup", "steps", "warned"), [(99, 100, 0), (100, 100, 1), (1000, 50, 1)])
def test_a_warmup_without_an_end_is_warned_of(warmup, steps, warned):
    training = TrainConfig(max_steps=steps, scheduler={"warmup_steps": warmup})
    lines = [line for line in make_plan(small_config(), training, 64, CPU).lines if "warmup_steps" in line]
    assert len(lines) == warned
    assert all(f"warmup_steps={warmup} is not below training.max_steps={steps}" in line for line in lines)


def test_many_epochs_are_warned_of():
    training = TrainConfig(max_steps=40, batch_size=2, gradient_accumulation_steps=2)
    assert epoch_lines(training, 20, world=2) == ("epochs       16.0: 320 sequences are drawn from 20",)
    said, warning = epoch_lines(training, 19, world=2)
    assert said == "epochs       16.8: 320 sequences are drawn from 19"
    assert warning.startswith("warning      more than 16 epochs")


@pytest.mark.parametrize("mhc", [True, False])
def test_a_step_beside_a_checkpoint_that_is_being_written_stays_within_the_plan(mhc):
    shape = dict(hidden_dim=256, num_layers=4, num_heads=4, num_kv_heads=4, ffn_dim=768, vocab_size=2048)
    config = small_config(**shape, max_seq_len=128, mhc_enabled=mhc)
    training = TrainConfig(batch_size=4, gradient_accumulation_steps=1, mixed_precision="fp32", compile=False)
    state, step = init_train_state(config, training, device="cpu"), make_train_step(config, training, donate=True)
    batch, kept = random_batch(config, 4, 128), []

    def save_and_step():
        kept.append(snapshot((state.params, state.optimizer)))
        step(state, batch)

    step(state, batch)
    parts = make_plan(config, training, 128, CPU).parts
    there = size_bytes((state.params, state.optimizer))
    planned = sum(parts.values()) - parts["runtime"] - there
    assert 1 <= planned / peak_bytes(save_and_step, CPU) <= 1.15
    assert parts["checkpoint"] == 12 * fn.count(config)


def test_a_merged_copy_is_planned_for_checkpoints_of_adapters():
    config, training = small_config(hidden_dim=128, num_layers=8), TrainConfig(mixed_precision="bf16", batch_size=1)
    lora = LoraConfig(rank=4)
    base = fn.cast(fn.init(config), config, torch.bfloat16)
    trained = fn.lora_init(base, lora)
    merged = size_bytes(fn.lora_merge(base, trained, lora.scale).layers)
    parts = make_plan(config, training, 64, CPU, lora=lora).parts
    assert parts["checkpoint"] == 12 * size(trained) + merged


def test_evaluation_needs_less_than_a_step(monkeypatch):
    config = small_config(hidden_dim=256, num_layers=4, ffn_dim=768, vocab_size=2048, max_seq_len=128)
    training = TrainConfig(batch_size=4, mixed_precision="bf16", remat="full", eval_batches=1)
    run, params = RunConfig(model=config, training=training, data={"max_length": 128}), fn.init(config)
    monkeypatch.setattr("rlm_mhc.train.evaluate.eval_batches", lambda *_: [random_batch(config, 4, 128)])
    held_out = SimpleNamespace(evaluation=SimpleNamespace(total=4))
    loss_sum = make_program(config, dataclasses.replace(training, compile=False)).loss_sum
    parts = make_plan(config, training, 128, CPU).parts
    planned = sum(parts.values()) - parts["runtime"] - parts["checkpoint"] - 12 * fn.count(config)
    assert peak_bytes(lambda: evaluate(loss_sum, params, run, held_out), CPU) <= planned
