import json

from rlm_mhc.variants import PROJECTIONS


def test_it_measures_every_projection_for_every_n_that_fits(recipe, tmp_path):
    result = recipe("projections", "tokens=64", "rounds=2", "compile=false", "device=cpu", f"output_dir={tmp_path}")
    assert result.code == 0, result.err
    (file,) = tmp_path.iterdir()
    measured = json.loads(file.read_text())
    expected = [(name, n) for name, rule in PROJECTIONS.items() for n in (2, 4, 8) if rule.fits(n)]
    rows = {(row["name"], row["n"]): row for row in measured["rows"]}
    assert list(rows) == [pair for pair in expected if pair[0] != "unconstrained"]
    for (name, _), row in rows.items():
        assert row["forward_ns"] > 0
        assert row["backward_bytes"] >= 0
        assert max(row["row_error"]) < 1e-5
        assert name == "sinkhorn" or max(row["column_error"]) < 1e-5
    assert max(rows["sinkhorn", 4]["column_error"]) > 1e-3
    assert result.out.count("| `") == len(rows)


def test_nonsense_is_one_line(recipe):
    assert "tokens=0" in recipe("projections", "tokens=0").last_error
