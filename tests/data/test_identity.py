"""The identity of data is their content: not where they lie, what they are called, or when they were written."""

import json
import os
import shutil
from pathlib import Path

import pytest

from rlm_mhc.data import Source, builtin_source, identity, jsonl_source, prepare
from rlm_mhc.data.identity import CHECKSUMS_FILE, identify

TEXTS = ["row column", "gain token layer", "stream matrix head"]


@pytest.fixture
def data(tmp_path):
    """A folder of three files, of one document each, that were not written just now."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, text in zip("abc", TEXTS, strict=True):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": text, "body": text}) + "\n")
        os.utime(folder / f"{name}.jsonl", (1e9, 1e9))
    return folder


def content(folder, path, field="text"):
    (found,) = identify(folder, [jsonl_source(str(path), field)]).content
    return found


def moved(data):
    return data.rename(data.parent / "moved")


def copied(data):
    return Path(shutil.copytree(data, data.parent / "copied", copy_function=shutil.copyfile))


def touched(data):
    os.utime(data / "b.jsonl")
    return data


def renamed_in_order(data):
    for name in "cba":
        (data / f"{name}.jsonl").rename(data / f"{name}x.json")
    return data


def linked(data):
    (data.parent / "link").symlink_to(data)
    return data.parent / "link"


@pytest.mark.parametrize("change", [moved, copied, touched, renamed_in_order, linked])
def test_the_same_content_is_the_same_data(tmp_path, data, change):
    before = content(tmp_path / "tokens", data)
    path = change(data)
    assert content(tmp_path / "tokens", path) == before
    assert content(tmp_path / "other_tokens", path) == before


def edited(data):
    text = (data / "b.jsonl").read_text()
    (data / "b.jsonl").write_text(text.replace("gain", "main"))
    os.utime(data / "b.jsonl", (1e9, 1e9))  # of the same size and time


def reordered(data):
    (data / "a.jsonl").rename(data / "z.jsonl")


def removed(data):
    (data / "c.jsonl").unlink()


def doubled(data):
    shutil.copy(data / "c.jsonl", data / "d.jsonl")


@pytest.mark.parametrize("change", [edited, reordered, removed, doubled])
def test_other_content_or_another_order_are_other_data(tmp_path, data, change):
    before = content(tmp_path / "tokens", data)
    change(data)
    assert content(tmp_path / "tokens", data) != before


def test_another_field_is_another_source(tmp_path, data):
    assert content(tmp_path, data, "body") != content(tmp_path, data, "text")


def test_files_are_read_once_and_again_only_when_they_changed(tmp_path, data, monkeypatch):
    read = []
    whole = identity.checksum
    monkeypatch.setattr(identity, "checksum", lambda file: read.append(file.name) or whole(file))
    first = content(tmp_path / "tokens", data)
    assert sorted(read) == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert content(tmp_path / "tokens", data) == first
    assert len(read) == 3
    os.utime(data / "b.jsonl", (1e9 + 1, 1e9 + 1))
    assert content(tmp_path / "tokens", data) == first
    assert read[3:] == ["b.jsonl"]
    for damage in ("nonsense", "[]", '{"x": 1}', json.dumps({str(data / "a.jsonl"): [None, 3]})):
        (tmp_path / "tokens" / CHECKSUMS_FILE).write_text(damage)
        assert content(tmp_path / "tokens", data) == first


def test_a_file_written_just_now_is_not_known_by_its_time(tmp_path):
    """Within one tick of the clock of a file system it may change again."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n')
    content(tmp_path / "tokens", file)
    assert not (tmp_path / "tokens" / CHECKSUMS_FILE).exists()


def test_a_folder_that_takes_no_files_is_done_without(tmp_path, data):
    (tmp_path / "file").touch()
    assert content(tmp_path / "file" / "tokens", data) == content(tmp_path / "tokens", data)


def test_sources_without_files_and_what_is_held_out(tmp_path):
    found = identify(tmp_path, [Source("few", "print", iter), None])
    assert found == (["print", "held-out"], ["print", "held-out"])
    built_in = builtin_source()
    assert len(built_in.files) > 1000
    assert all(map(os.path.isfile, built_in.files))


def prepared(folder, path, eval_path=None, **options):
    said = []
    sources = jsonl_source(str(path)), jsonl_source(str(eval_path)) if eval_path else None
    return prepare(folder, *sources, tokenizer="auto", vocab_size=300, max_length=4, say=said.append), said


def test_tokens_of_moved_data_are_reused_also_with_data_to_evaluate_on(tmp_path, data):
    before, _ = prepared(tmp_path / "tokens", data / "a.jsonl", data / "b.jsonl")
    there = copied(data)
    after, said = prepared(tmp_path / "tokens", there / "a.jsonl", there / "b.jsonl")
    assert len(said) == 1
    assert "reused" in said[0]
    assert after.has(before.fingerprint)
    other, _ = prepared(tmp_path / "tokens", there / "a.jsonl", there / "c.jsonl")
    assert not other.has(before.fingerprint)


def test_what_earlier_versions_wrote_by_path_size_and_time_is_still_known(tmp_path, data):
    new, _ = prepared(tmp_path / "tokens", data)
    meta = json.loads((tmp_path / "tokens" / "meta.json").read_text())
    source = jsonl_source(str(data))
    tokens, tokenizer = tmp_path / "tokens" / "train.bin", tmp_path / "tokens" / "tokenizer" / "trained_on.json"
    meta["key"][1] = source.former
    (tmp_path / "tokens" / "meta.json").write_text(json.dumps(meta))
    tokenizer.write_text(json.dumps([meta["key"][0], source.former, 300]))
    written = tokens.stat().st_mtime_ns
    again, said = prepared(tmp_path / "tokens", data)
    assert "reused" in said[-1]
    assert tokens.stat().st_mtime_ns == written
    assert again.fingerprint == new.fingerprint
    assert again.has(again.former)
    touched(data)
    later, said = prepared(tmp_path / "tokens", data)
    assert "reused" in said[-1]  # the files have the key of this version now
    assert not later.has(again.former)


@pytest.mark.parametrize("nothing", [None, "", 0])
def test_a_checkpoint_without_a_fingerprint_is_of_no_data(tmp_path, data, nothing):
    assert not prepared(tmp_path, data)[0].has(nothing)
    assert not prepared(tmp_path, data)[0]._replace(former="").has(nothing)
