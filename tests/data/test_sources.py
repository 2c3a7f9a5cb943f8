import gzip
import json

import pytest
import zstandard

from rlm_mhc.data import BadLines, builtin_source, jsonl_source

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
    assert list(source.read(BadLines())) == TEXTS
    assert list(source.read(BadLines())) == TEXTS


def test_folder_and_glob_and_blank_lines(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.jsonl").write_text('{"text": "1"}\n\n{"text": "2"}')
    (tmp_path / "b" / "c.jsonl").write_text('{"text": "3"}\r\n')
    (tmp_path / "notes.md").write_text("not data")
    assert list(jsonl_source(str(tmp_path)).read(BadLines())) == ["1", "2", "3"]
    assert list(jsonl_source(str(tmp_path / "*.jsonl")).read(BadLines())) == ["1", "2"]


def test_another_field_and_lone_surrogates(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x\\ud800y"}\n')
    assert list(jsonl_source(str(tmp_path), "body").read(BadLines())) == ["x\ufffdy"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "a"}\n{"text": \n', ["line 2", "not JSON"]),
        (b'{"text": "a"}\n{"text": "b', ["line 2", "not JSON", "is the file cut short?"]),
        (b'{"text": "a"}\n[1]\n', ["line 2", "JSON object", "list"]),
        (b'{"txt": "a"}\n', ["line 1", "no field 'text'", "'txt'", "data.text_field"]),
        (b'{"text": 3}\n', ["line 1", "not a string but int"]),
        (b'{"text": null}\n', ["line 1", "NoneType"]),
        (b"", ["empty"]),
        (b"\x89PNG\r\n\x1a\n\x00\xff", ["binary"]),
        (bytes(range(32)) * 3, ["line 1", "binary"]),
        (b'{"text": ' + b"[" * 100_000 + b"\n", ["line 1", "nested too deep"]),
    ],
)
def test_bad_data_names_the_file_and_the_line(tmp_path, content, words):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        list(jsonl_source(str(file)).read(BadLines()))
    assert all(word in str(caught.value) for word in [str(file), *words]), caught.value


@pytest.mark.parametrize("name", ["bad.jsonl.gz", "bad.jsonl.zst"])
def test_a_damaged_archive_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"not an archive at all")
    with pytest.raises(ValueError, match=name):
        list(jsonl_source(str(tmp_path / name)).read(BadLines()))


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
    documents = [text for text, _ in zip(source.read(BadLines()), range(200), strict=False)]
    assert len(documents) == 200
    assert all(text.strip() for text in documents)
    assert any("The" in text for text in documents)
    assert builtin_source().fingerprint == source.fingerprint


GOOD = b'{"text": "good"}\n'
BAD = [
    b"nonsense\n",
    b'{"text": "\xff"}\n',
    b'{"body": "a"}\n',
    b"[1]\n",
    b'{"text": 1}\n',
    b"\0\n",
    b"[" * 9999 + b"\n",
]


@pytest.mark.parametrize("encode", [bytes, gzip.compress, zstandard.ZstdCompressor().compress])
def test_bad_lines_are_skipped_counted_and_the_first_ones_named(tmp_path, encode):
    file = tmp_path / {bytes: "a.jsonl", gzip.compress: "a.jsonl.gz"}.get(encode, "a.jsonl.zst")
    # Two members or frames, one after the other.
    file.write_bytes(encode(GOOD * 3 + b"".join(BAD)) + encode(GOOD * 4))
    said = []
    bad = BadLines(strict=False, max_fraction=0.5, say=said.append)
    assert list(jsonl_source(str(file)).read(bad)) == ["good"] * 7
    assert (bad.lines, bad.bad) == (7 + len(BAD), len(BAD))
    assert len(said) == 5
    assert said[0].startswith(f"bad line     {file}, line 4: not JSON")
    assert "line 5: not UTF-8" in said[1]
    bad.finish()
    bad.max_fraction = 0.4
    with pytest.raises(ValueError, match=r"7 of 14 lines are bad.*max_bad_fraction=0\.4.*line 4: not JSON"):
        bad.finish()


def test_too_many_bad_lines_end_the_reading_early(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"body": "a"}\n' * 5000)
    bad = BadLines(strict=False, max_fraction=0.01)
    with pytest.raises(ValueError, match=r"1000 of 1000 lines.*data\.text_field"):
        list(jsonl_source(str(file)).read(bad))


def test_an_endless_line_is_one_bad_line_and_is_never_held(tmp_path, monkeypatch):
    monkeypatch.setattr("rlm_mhc.data.lines.MAX_LINE_BYTES", 100)
    monkeypatch.setattr("rlm_mhc.data.lines.PIECE_BYTES", 7)
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD + b'{"text": "' + b"x" * 1000 + b'"}\n' + GOOD + b"[" * 500)
    bad = BadLines(strict=False, max_fraction=1.0)
    assert list(jsonl_source(str(file)).read(bad)) == ["good", "good"]
    assert (bad.lines, bad.bad) == (4, 2)
    assert "line 2: longer than" in bad.first


def test_an_archive_that_ends_early_is_an_error_and_says_where(tmp_path):
    file = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % (i * 7919) for i in range(9999)))
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: cannot be read after line \d{3,}"):
        list(jsonl_source(str(file)).read(BadLines(strict=False, max_fraction=1.0)))


def test_empty_files_among_others_are_told_of_and_skipped_unless_strict(tmp_path):
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b""))
    said = []
    bad = BadLines(strict=False, max_fraction=0.0, say=said.append)
    source = jsonl_source(str(tmp_path))
    assert list(source.read(bad)) == ["good"]
    bad.finish()
    assert (bad.lines, bad.bad, bad.empty_files) == (1, 0, 2)
    assert [line.split(": ")[0] for line in said] == [f"empty file   {tmp_path / x}" for x in ("a.jsonl", "c.jsonl.gz")]
    with pytest.raises(ValueError, match=r"a\.jsonl: the file is empty"):
        list(source.read(BadLines()))


def test_data_of_empty_files_alone_are_an_error(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").touch()
    with pytest.raises(ValueError, match=r"\(2 files\): all files are empty"):
        list(jsonl_source(str(tmp_path)).read(BadLines(strict=False)))
