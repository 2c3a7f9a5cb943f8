import gzip
import json

import pytest
import zstandard

from rlm_mhc.data import builtin_source, jsonl_source

TEXTS = ["one", "zwei\nlines", "三 😀", ""]
LINES = "".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(TEXTS))


@pytest.mark.parametrize(
    ("name", "encode"),
    [
        ("a.jsonl", bytes),
        ("a.jsonl.gz", gzip.compress),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress),
    ],
)
def test_reads_every_compression_twice(tmp_path, name, encode):
    (tmp_path / name).write_bytes(encode(LINES.encode()))
    source = jsonl_source(str(tmp_path / name))
    assert list(source.read()) == TEXTS
    assert list(source.read()) == TEXTS


def test_folder_and_glob_and_blank_lines(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.jsonl").write_text('{"text": "1"}\n\n{"text": "2"}')
    (tmp_path / "b" / "c.jsonl").write_text('{"text": "3"}\r\n')
    (tmp_path / "notes.md").write_text("not data")
    assert list(jsonl_source(str(tmp_path)).read()) == ["1", "2", "3"]
    assert list(jsonl_source(str(tmp_path / "*.jsonl")).read()) == ["1", "2"]


def test_another_field_and_lone_surrogates(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x\\ud800y"}\n')
    assert list(jsonl_source(str(tmp_path), "body").read()) == ["x\ufffdy"]


def test_fingerprint_follows_the_content(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(LINES)
    first = jsonl_source(str(file)).fingerprint
    assert jsonl_source(str(file)).fingerprint == first
    assert jsonl_source(str(file), "id").fingerprint != first
    file.write_text(LINES * 2)
    assert jsonl_source(str(file)).fingerprint != first


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "a"}\n{"text": \n', ["line 2", "not JSON"]),
        (b'{"text": "a"}\n[1]\n', ["line 2", "JSON object", "list"]),
        (b'{"txt": "a"}\n', ["line 1", "no field 'text'", "'txt'", "data.text_field"]),
        (b'{"text": 3}\n', ["line 1", "not a string but int"]),
        (b'{"text": null}\n', ["line 1", "NoneType"]),
        (b"", ["empty"]),
        (b"\x89PNG\r\n\x1a\n\x00\xff", ["binary"]),
        (bytes(range(32)) * 3, ["line 1", "binary"]),
        (b'{"text": ' + b"[" * 100_000 + b"\n", ["line 1", "not JSON"]),
    ],
)
def test_bad_data_names_the_file_and_the_line(tmp_path, content, words):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        list(jsonl_source(str(file)).read())
    assert all(word in str(caught.value) for word in [str(file), *words]), caught.value


@pytest.mark.parametrize("name", ["bad.jsonl.gz", "bad.jsonl.zst"])
def test_a_damaged_archive_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"not an archive at all")
    with pytest.raises(ValueError, match=name):
        list(jsonl_source(str(tmp_path / name)).read())


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.train_path=.*nope\.jsonl"):
        jsonl_source(str(tmp_path / "nope.jsonl"))
    with pytest.raises(FileNotFoundError, match="the folder has no file"):
        jsonl_source(str(tmp_path))
    (tmp_path / "data.parquet").write_text("x")
    with pytest.raises(ValueError, match="ending in"):
        jsonl_source(str(tmp_path / "data.parquet"))


def test_builtin_corpus_is_real_text():
    source = builtin_source()
    documents = [text for text, _ in zip(source.read(), range(200), strict=False)]
    assert len(documents) == 200
    assert all(text.strip() for text in documents)
    assert any("The" in text for text in documents)
    assert builtin_source().fingerprint == source.fingerprint
