"""trl's trainers take the models as they take transformers' own: two steps each, every weight moves."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import rlm_mhc.model  # noqa: F401 (registers with the Auto classes)

pytestmark = pytest.mark.slow
TEXTS = [{"text": "stream matrix row column " * count} for count in (1, 2, 3, 4)] * 2
PAIRS = [{"prompt": "stream", "chosen": " matrix row", "rejected": " column"}] * 8
PROMPTS = [{"prompt": "stream matrix"}] * 8


@pytest.fixture
def train(checkpoint, tmp_path):
    """Two steps of a trainer; the losses, and the names of weights that were trained and did not move."""
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    from datasets import Dataset

    def run(kind, rows, *, load=AutoModelForCausalLM.from_pretrained, trainer=None, **options):
        model = load(checkpoint)
        arguments = dict(
            output_dir=str(tmp_path / "trainer"),
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        trained = getattr(trl, f"{kind}Trainer")(
            model=model,
            args=getattr(trl, f"{kind}Config")(**arguments, **options),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(checkpoint),
            **(trainer or {}),
        )
        before = {name: p.detach().clone() for name, p in trained.model.named_parameters() if p.requires_grad}
        trained.train()
        losses = [row["loss"] for row in trained.state.log_history if "loss" in row]
        still = [
            name for name, p in trained.model.named_parameters() if name in before and torch.equal(before[name], p)
        ]
        return losses, still, before

    return run


def test_sft_learns(train):
    losses, still, _ = train("SFT", TEXTS, max_length=32)
    assert losses[1] < losses[0]
    assert not still


def test_sft_of_packed_rows_learns(train):
    losses, still, _ = train("SFT", TEXTS, max_length=32, packing=True)
    assert losses[1] < losses[0]
    assert not still


def test_sft_of_adapters_learns(train):
    from peft import LoraConfig

    losses, _, trained = train("SFT", TEXTS, max_length=32, trainer={"peft_config": LoraConfig(r=2)})
    assert losses[1] < losses[0]
    assert trained
    assert all("lora_" in name for name in trained)


def test_dpo_learns_what_is_preferred(train):
    losses, still, _ = train("DPO", PAIRS, max_length=32)
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: the model is its own reference
    assert losses[1] < losses[0]
    assert not still


def test_grpo_moves_every_weight(train):
    def reward(completions, **columns):
        return [float(len(text)) for text in completions]

    options = dict(num_generations=4, max_completion_length=8)
    losses, still, _ = train("GRPO", PROMPTS, trainer={"reward_funcs": reward}, **options)
    assert len(losses) == 2
    assert not still


def test_a_reward_model_learns_what_is_preferred(train):
    def load(folder):
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)

    losses, still, _ = train("Reward", PAIRS, load=load, max_length=32)
    assert losses[1] < losses[0]
    assert not still
