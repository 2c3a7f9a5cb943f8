import json

import pytest

TINY = ["layers=2", "width=32", "num_heads=2", "vocab_size=300", "length=16", "batch_size=4", "warmup=2", "lr=1e-2"]


def test_a_llama_and_what_it_became_start_at_one_loss_and_both_learn(recipe, corpus, tmp_path):
    folders = [f"train_path={corpus}", f"work_dir={tmp_path / 'work'}", f"output_dir={tmp_path / 'results'}"]
    result = recipe("upcycling", *TINY, *folders, "steps=12", "eval_batches=2")
    assert result.code == 0, result.err
    written = json.loads((tmp_path / "results" / "upcycling_32x2.json").read_text())
    assert written["difference_before"] < 1e-5
    before, after, losses = (written[key] for key in ("held_out_before", "held_out_after", "training_loss"))
    assert losses["mhc"][0] == pytest.approx(losses["llama"][0], rel=1e-5)
    for name in ("llama", "mhc"):
        assert len(losses[name]) == 12
        assert after[name] < before[name] - 0.2
    assert (tmp_path / "results" / "upcycling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", ["steps=1", "mhc_flows=1", "lr=-1"])
def test_nonsense_is_one_line(recipe, wrong):
    assert wrong in recipe("upcycling", wrong).last_error
