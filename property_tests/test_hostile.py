"""Whatever the bytes of a file or the values of a config: what comes out is a result, or an error for people.

A longer run: `pytest property_tests/test_hostile.py --hypothesis-profile=fuzz`.
"""

import dataclasses
import json
import resource
import string
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlm_mhc import fn, load_pretrained, save_pretrained
from rlm_mhc.checkpoint import load_run, newest_whole, save_run
from rlm_mhc.checkpoint.run import _state_checksum
from rlm_mhc.data import BadLines, chat_parse, completion_parse, find_format, jsonl_source, record_source
from rlm_mhc.data.chat import CHATML
from rlm_mhc.disk import CHECKSUM
from rlm_mhc.model import RLMModel
from rlm_mhc.testing import small_config
from rlm_mhc.train import FinetuneConfig, RunConfig
from rlm_mhc.train.output import read_config, write_config
from rlm_mhc.validation import build

ALLOWED = (ValueError, FileNotFoundError)
MOST_MEMORY_KIB = 1 << 20
CONFIG = small_config(num_layers=1)
PARAMS = fn.init(CONFIG)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=9),
    st.sampled_from(["auto", "bf16", "none", 10**400, -1, 0, 1e308]),
)
KEYS = st.sampled_from([f.name for f in dataclasses.fields(FinetuneConfig)]) | st.text(string.ascii_letters, max_size=9)
FIELDS = st.sampled_from(
    ["rank", "targets", "hidden_dim", "num_heads", "optimizer", "lr", "betas", "batch_size", "max_length", "project"]
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | FIELDS, inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module", autouse=True)
def memory_stays_bounded():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY_KIB


def result_or_error(read):
    """What `read` gives, or None where it fails as it should."""
    try:
        return read()
    except ALLOWED as error:
        said = str(error)
    assert said.strip(), "an error without a word"
    return None


@st.composite
def mutilated(draw, content):
    """Bytes with some replaced, removed, repeated, or put in."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 40)))
        content[start:end] = draw(st.binary(max_size=20) | st.just(bytes(content[start:end] * 3)) | st.just(b""))
    return bytes(content)


def written(write):
    """The files that `write(folder)` leaves, by name."""
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder)) or Path(folder)
        return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


PRETRAINED = written(lambda folder: save_pretrained(folder, PARAMS, CONFIG))
RUN = written(lambda folder: save_run(folder, PARAMS, CONFIG, fn.adamw_init(PARAMS), {"step": 1}, keep=1))
YAML = written(lambda folder: write_config(RunConfig(), folder / "config.yaml"))["config.yaml"]


def place(folder, files):
    for name, content in files.items():
        (Path(folder) / name).write_bytes(content)


@given(TREES, st.sampled_from([RunConfig, FinetuneConfig]))
def test_any_tree_of_values_is_a_config_or_an_error(tree, kind):
    config = result_or_error(lambda: build(kind, tree))
    assert config is None or isinstance(config, kind)


@given(st.binary(max_size=300) | mutilated(YAML) | TREES.map(lambda tree: json.dumps(tree).encode()))
def test_any_bytes_are_a_config_file_or_an_error(content):
    with tempfile.TemporaryDirectory() as folder:
        place(folder, {"config.yaml": content})
        config = result_or_error(lambda: read_config(Path(folder, "config.yaml")))
        assert config is None or isinstance(config, RunConfig)


@pytest.mark.parametrize("content", [b"a: &a [x]\n" + b"b: *a\n", b"[" * 50_000, b"{" * 50_000, b"a: " * 50_000, b"\0"])
def test_bombs_of_yaml_are_errors(tmp_path, content):
    place(tmp_path, {"config.yaml": content})
    with pytest.raises(ValueError, match=r"config\.yaml: not a config"):
        read_config(tmp_path / "config.yaml")


def test_a_number_of_base_60_does_not_take_its_length_squared(tmp_path):
    place(tmp_path, {"config.yaml": b"a: 1" + b":1" * 500_000})
    with pytest.raises(ValueError, match="a value of more than 4096 characters"):
        read_config(tmp_path / "config.yaml")


@pytest.mark.parametrize("field", ["num_layers", "mhc_flows"])
def test_a_config_cannot_ask_for_more_weights_than_can_be_named(tmp_path, field):
    fields = json.loads(PRETRAINED["config.json"]) | {field: 10**6}
    place(tmp_path, PRETRAINED | {"config.json": json.dumps(fields).encode()})
    with pytest.raises(ValueError, match=rf"config\.json: {field}=1000000: expected a number from 1 to"):
        load_pretrained(tmp_path)


LINES = st.lists(st.binary(max_size=60) | TREES.map(lambda x: json.dumps({"text": x}).encode()), max_size=8)


@given(LINES, st.sampled_from([".jsonl", ".jsonl.gz", ".jsonl.zst"]))
def test_any_lines_are_texts_or_counted_or_an_error(lines, suffix):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"data{suffix}")
        file.write_bytes(b"\n".join(lines))
        bad = BadLines(strict=False, max_fraction=1.0)
        texts = result_or_error(lambda: list(jsonl_source(str(file)).read(bad)))
        if texts is not None:
            assert all(isinstance(text, str) and text.encode() is not None for text in texts)
            assert len(texts) + bad.bad == bad.lines


MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", 1]), "content": TREES}))
RECORDS = st.fixed_dictionaries(
    {},
    optional={"prompt": SCALARS, "completion": SCALARS, "messages": MESSAGES | TREES, "text": SCALARS, "tools": TREES},
)


class Tokenizer:
    """What the formats ask of one, with transformers' rendering."""

    eos_token, added_tokens_decoder, name_or_path, chat_template = "</s>", {}, "fake", CHATML

    def get_chat_template(self, *, tools):
        return self.chat_template

    def apply_chat_template(self, messages, *, tools, tokenize, add_generation_prompt):
        from transformers.utils.chat_template_utils import render_jinja_template

        given = {"chat_template": self.chat_template, "eos_token": self.eos_token}
        (text,), _ = render_jinja_template(
            [messages], tools=tools, add_generation_prompt=add_generation_prompt, **given
        )
        return text


@given(st.lists(RECORDS, max_size=4), st.sampled_from([chat_parse(Tokenizer()), completion_parse()]))
def test_any_records_are_examples_or_counted_or_an_error(records, parse):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "data.jsonl")
        file.write_text("\n".join(map(json.dumps, records)))
        result_or_error(lambda: find_format(str(file), "text"))
        bad = BadLines(strict=False, max_fraction=1.0)
        examples = result_or_error(lambda: list(record_source(str(file), parse).read(bad)))
        if examples is not None:
            assert all(part.text.encode() for example in examples for part in example.spans)
            assert len(examples) + bad.bad == bad.lines


@pytest.mark.parametrize("depth", [600, 5000, 100_000])
def test_a_line_nested_too_deep_is_a_bad_line(tmp_path, depth):
    message, file = '{"role": "assistant", "content": "yes"', tmp_path / "data.jsonl"
    nested = message + ', "tool_calls": ' + "[" * depth + "]" * depth
    file.write_text("".join(f'{{"messages": [{said}}}]}}\n' for said in (nested, message)))
    bad = BadLines(strict=False, max_fraction=1.0)
    assert len(list(record_source(str(file), chat_parse(Tokenizer())).read(bad))) + bad.bad == 2
    # How deep JSON may nest depends on the interpreter and its stack: 600 may be read, and are no tool calls then.
    reasons = ("nested too deep", "messages[0].tool_calls") if depth == 600 else ("nested too deep",)
    assert bad.first.startswith(tuple(f"{file}, line 1: {reason}" for reason in reasons))


def tree_of_module(folder, verify):
    return RLMModel.from_pretrained(folder, verify=verify).tree()


def tree_of_fn(folder, verify):
    return load_pretrained(folder, verify=verify)[0]


@given(st.sampled_from(sorted(PRETRAINED)), st.sampled_from([tree_of_fn, tree_of_module]), st.data())
def test_any_bytes_are_a_model_or_an_error(name, load, data):
    content = data.draw(mutilated(PRETRAINED[name]) | st.binary(max_size=200))
    with tempfile.TemporaryDirectory() as folder:
        place(folder, PRETRAINED | {name: content})
        loaded = result_or_error(lambda: load(folder, data.draw(st.booleans())))
        assert loaded is None or isinstance(loaded.norm.weight, torch.Tensor)


@given(st.sampled_from(sorted(RUN)), st.data())
def test_any_bytes_are_a_run_or_an_error(name, data):
    content = data.draw(mutilated(RUN[name]) | st.binary(max_size=200))
    with tempfile.TemporaryDirectory() as folder:
        place(folder, RUN | {name: content})
        result_or_error(lambda: load_run(Path(folder), fn.adamw_init, verify=data.draw(st.booleans())))


@st.composite
def disfigured(draw, value):
    """A JSON value with one of its parts, or itself, replaced or removed."""
    if not isinstance(value, dict) or not value or draw(st.booleans()):
        return draw(TREES)
    name = draw(st.sampled_from(sorted(value)))
    rest = {key: item for key, item in value.items() if key != name}
    return rest if draw(st.booleans()) else {**rest, name: draw(disfigured(value[name]))}


STATE = {name: value for name, value in json.loads(RUN["trainer_state.json"]).items() if name != CHECKSUM}


@given(disfigured(STATE).filter(lambda state: isinstance(state, dict)))
def test_any_state_that_fits_its_checksum_is_a_run_or_an_error(state):
    state = json.loads(json.dumps(state))
    content = json.dumps({**state, CHECKSUM: _state_checksum(state)})
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "checkpoint-1")
        checkpoint.mkdir()
        place(checkpoint, RUN | {"trainer_state.json": content.encode()})
        result_or_error(lambda: load_run(checkpoint, fn.adamw_init))
        result_or_error(lambda: newest_whole(Path(folder), lambda line: None))
