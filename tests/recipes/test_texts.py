"""Text fields of every recipe are as typed, `~` is the user's home in paths, and output may have any encoding."""

import dataclasses
import io
import json
import os
import re
import runpy
import sys
import typing
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import rlm_mhc.train
from rlm_mhc.testing.runs import SMALL_RUN, run_script
from rlm_mhc.train import RunConfig
from rlm_mhc.train.command import _leaf_keys, quote_texts
from rlm_mhc.train.finetune_config import with_model
from rlm_mhc.train.output import read_config, write_config
from rlm_mhc.validation import text_fields

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.stem for path in (RECIPES / "configs").glob("*.yaml"))
TYPED = ["2026_11_25", "true", "1e3", "0x10", "on", "~/x", "2026-11-25", "a=b, c (1) [2] {3}", "None", "1_000", ".5"]
TYPED += ["nan", "it's", 'say "hi"', "back\\", "", " x ", "12:30:45", "~", "#1", "$HOME", "007", "a:b", "@x", "数学"]
PATHS = re.compile(r"(_dir|_path|_file|checkpoint|source|tokenizer|chat_template)$")


@pytest.fixture
def config_type(monkeypatch):
    def find(name):
        found = []
        monkeypatch.setattr(rlm_mhc.train, "command", lambda kind, *rest, **options: found.append(kind))
        monkeypatch.setattr(sys, "argv", [name])
        runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
        monkeypatch.undo()
        return found[0]

    return find


def fields(kind):
    """All fields of a config and its sections."""
    for field in dataclasses.fields(kind):
        if section := field.metadata.get("section"):
            yield from fields(section)
        else:
            yield field, typing.get_type_hints(kind)[field.name]


@pytest.mark.parametrize("name", NAMES)
def test_every_text_of_a_recipe_reaches_its_config_as_typed(recipe, config_type, name):
    written = OmegaConf.create((RECIPES / "configs" / f"{name}.yaml").read_text())
    listed = set(_leaf_keys(written)) - {"prompt"}
    keys = [key for key in text_fields(config_type(name)) if key in listed]
    typed = {key: TYPED[number % len(TYPED)] for number, key in enumerate(keys * 3)}
    result = recipe(name, "--cfg", "job", *(f"{key}={value}" for key, value in typed.items()))
    assert result.code == 0, result.err
    composed = OmegaConf.create(yaml.safe_load(result.out))
    assert {key: OmegaConf.select(composed, key) for key in keys} == typed


@pytest.mark.parametrize("name", NAMES)
def test_every_path_of_a_recipe_may_begin_at_home(config_type, name):
    texts = [(field, hint) for field, hint in fields(config_type(name)) if hint in (str, str | None)]
    expanded = {field.name for field, _ in texts if field.metadata.get("path")}
    assert expanded == {field.name for field, _ in texts if PATHS.search(field.name)}


def test_home_is_expanded_in_paths_alone(monkeypatch):
    monkeypatch.setenv("HOME", "/home/user")
    data = {"cache_dir": "~/c", "tokenizer": "~/t", "train_path": "~/*.jsonl", "text_field": "~/f", "max_length": 64}
    run = RunConfig(output_dir="~/x", data=data, training={"wandb": {"project": "~"}}, resume_from_checkpoint="a/~")
    assert (run.output_dir, run.resume_from_checkpoint) == ("/home/user/x", "a/~")
    assert (run.data.cache_dir, run.data.tokenizer) == ("/home/user/c", "/home/user/t")
    assert (run.data.train_path, run.data.text_field) == ("/home/user/*.jsonl", "~/f")
    assert run.training.wandb.project == "~"
    with pytest.raises(FileNotFoundError, match="checkpoint=/home/user/none: no such folder"):
        with_model({"checkpoint": "~/none"})
    with pytest.raises(ValueError, match="output_dir=2024: expected a string, not int; put it in quotes"):
        RunConfig(output_dir=2024)


@settings(deadline=None)
@given(st.text(st.characters(exclude_characters="\0")))
def test_hydra_reads_a_quoted_text_as_typed(text):
    (argument,) = quote_texts([f"+a.b={text}"], ["a.b"])
    if argument.partition("=")[2] != text:  # else it is meant for Hydra
        (override,) = OverridesParser.create().parse_overrides([argument])
        assert override.value() == text
    else:
        assert text == "null" or "${" in text or text[0] == text[-1] in "'\""


def test_what_is_meant_for_hydra_stays():
    meant = ["a=null", "a='2024'", 'a="x y"', "a=${b}", "a=x-${now:%Y}", "b=1_000", "~a", "a"]
    assert quote_texts(meant, ["a"]) == meant
    assert quote_texts(["-m", "a=x,y", "a=choice(x,y)", "a=1e3"], ["a"]) == ["-m", "a=x,y", "a=choice(x,y)", "a='1e3'"]


@settings(deadline=None, max_examples=40)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"])))
def test_texts_of_a_config_come_back_from_its_yaml(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    run = RunConfig(output_dir=f"/{text}", training={"wandb": {"entity": text}})
    write_config(run, file)
    assert read_config(file) == run


@pytest.fixture
def speaking(monkeypatch):
    """Run a recipe with stdout and stderr of an encoding; gives the exit code and what was written."""

    def run(encoding, name, *arguments):
        files = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", files[0])
        monkeypatch.setattr(sys, "stderr", files[1])
        code = run_script(RECIPES / f"{name}.py", *arguments)
        return code, *(file.buffer.getvalue().decode(encoding) for file in files)

    return run


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_run_goes_on_in_any_encoding_with_files_whose_names_are_no_utf8(speaking, tmp_path, encoding):
    folder, out_dir = os.fsdecode(os.fsencode(tmp_path) + b"/na\xefve"), tmp_path / "run $\\none$ ~"
    os.mkdir(folder)
    rows = [json.dumps({"text": f"row {i}: streams mix in a doubly stochastic matrix"}) for i in range(60)]
    Path(folder, "数.jsonl").write_text("\n".join(rows))
    arguments = [*SMALL_RUN, f"data.train_path={folder}/数.jsonl", f"output_dir={out_dir}", "training.max_steps=1"]
    code, out, err = speaking(encoding, "pretrain_1b", *arguments)
    assert code == 0, err
    assert r"na\udcefve" in out
    assert (out_dir / "checkpoints" / "checkpoint-1").is_dir()
    code, _, err = speaking(encoding, "pretrain_1b", *SMALL_RUN, f"output_dir={folder}/run")
    assert code == 2
    assert re.search(r"output_dir=.*/na\\udcefve/run: .*not UTF-8.*choose another", err.splitlines()[-1])
