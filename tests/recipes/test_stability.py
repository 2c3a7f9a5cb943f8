import json

import pytest

VARIANTS = ["residual", "hc", "mhc", "identity"]
TINY = [
    "layers=2",
    "width=16",
    "num_heads=2",
    "vocab_size=300",
    "length=16",
    "batch_size=2",
    "warmup=2",
    "seeds=1",
    "probes=3",
    "eval_batches=2",
    "compile=false",
    "device=cpu",
]


@pytest.fixture
def stability(recipe, corpus, tmp_path):
    folders = [f"output_dir={tmp_path / 'results'}", f"work_dir={tmp_path / 'work'}"]
    return lambda *arguments: recipe("stability", *TINY, f"train_path={corpus}", *folders, *arguments)


def test_it_trains_every_variant_and_writes_table_and_pictures(stability, tmp_path):
    result = stability("steps=6")
    assert result.code == 0, result.err
    written = json.loads((tmp_path / "results" / "stability_cpu_16x2.json").read_text())
    assert [row["name"] for row in written["rows"]] == VARIANTS
    assert all(4 < row["training_loss"]["mean"] < 7 and 4 < row["held_out_loss"]["mean"] < 7 for row in written["rows"])
    assert all(not row["diverged_at"] and row["step_ms"] > 0 for row in written["rows"])
    gains = {row["name"]: row["largest_gain_backward"] for row in written["rows"]}
    assert gains["residual"] == gains["identity"] == 1
    assert 1 <= gains["mhc"] < 1.2
    assert {"date", "command", "device", "processor", "versions"} <= written.keys()
    for name in ("stability_loss.png", "stability_gain.png"):
        assert (tmp_path / "results" / name).read_bytes().startswith(b"\x89PNG")
    assert all(f"\n| {name} | " in result.out for name in VARIANTS)
    series = json.loads((tmp_path / "work" / "series.json").read_text())
    assert [len(run["losses"]) for run in series] == [6] * 4
    assert [run["probed"] for run in series] == [[0, 2, 4, 6]] * 4


def test_a_run_that_diverges_is_a_result(stability, tmp_path):
    result = stability("steps=8", "lr=1e30")
    assert result.code == 0, result.err
    written = json.loads((tmp_path / "results" / "stability_cpu_16x2.json").read_text())
    assert all(row["diverged_at"]["0"] <= 8 and row["training_loss"] is None for row in written["rows"])
    assert "1 of 1" in result.out


@pytest.mark.parametrize("wrong", ["steps=0", "warmup=800", "lr=-1", "vocab_size=2"])
def test_nonsense_is_one_line(recipe, wrong):
    assert wrong in recipe("stability", wrong).last_error
