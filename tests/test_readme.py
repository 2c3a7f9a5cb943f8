"""The README is true: its blocks, its loop, its keys and its counts."""

import re
from pathlib import Path

import pytest
import yaml

from rlm_mhc import ModelConfig, fn

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.S | re.M)


def test_the_quick_start_has_exactly_two_blocks():
    section = README.split("\n## Quick start\n")[1].split("\n## ")[0]
    assert len(blocks("bash", section)) == 2
    assert len(blocks("bash")) == 2


def test_the_loop_runs_as_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "README.md").write_text(README)
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), names)
    assert "largest backward gain" in capsys.readouterr().out
    assert names["state"].step == 1


@pytest.mark.parametrize("recipe", ["pretrain_1b", "finetune"])
def test_every_key_of_the_command_line_is_in_the_reference(recipe):
    config = yaml.safe_load((ROOT / "recipes" / "configs" / f"{recipe}.yaml").read_text())
    model = yaml.safe_load((ROOT / "recipes" / "configs" / "model" / "tiny.yaml").read_text())
    del config["defaults"], config["hydra"]

    def leaves(tree):
        for key, value in tree.items():
            yield from leaves(value) if isinstance(value, dict) else [key]

    assert [key for key in leaves(config | {"model": model}) if not re.search(rf"[`.]{key}\b", README)] == []


def test_counts_and_links():
    assert "@@" not in README
    for preset in ("tiny", "125m", "1b", "7b"):
        assert f"{fn.count(ModelConfig.preset(preset)):,}" in README
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_tree_names_every_folder_of_the_package():
    folders = [p.name for p in (ROOT / "rlm_mhc").iterdir() if p.is_dir() and not p.name.startswith("__")]
    assert [name for name in folders if f"{name}/" not in README] == []
