"""A path, folder or pattern stands for its files, each of them once."""

import json
import os

import pytest

from rlm_mhc.data import BadLines, jsonl_source
from rlm_mhc.data.files import find_files


@pytest.fixture
def tree(tmp_path):
    """A folder with a file at every level, entered by way of the working directory or not."""
    for name in ("b.jsonl", "a/c.json", "a/d/e.jsonl.gz", "notes.md", ".hidden.jsonl", ".cache/f.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def names(found, folder):
    return [os.path.relpath(file, folder) for file in found]


ALL = ["a/c.json", "a/d/e.jsonl.gz", "b.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ALL),
        ("**", [*ALL, "notes.md"]),
        ("**/*.json*", ALL),
        ("a/**/*.gz", ALL[1:2]),
        ("**/d/*", ALL[1:2]),
        ("*.jsonl", ["b.jsonl"]),
        ("*/*.json", ["a/c.json"]),
        ("[a]/*.json", ["a/c.json"]),
    ],
)
def test_folders_and_patterns_find_what_glob_finds(tree, monkeypatch, pattern, expected):
    assert names(find_files(str(tree / pattern)), tree) == expected
    if pattern:
        monkeypatch.chdir(tree)
        assert find_files(pattern) == expected


@pytest.mark.parametrize("name", ["set[v1]", "what?", "a*", "[!x]"])
def test_a_folder_named_like_a_pattern_is_a_folder(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.jsonl").touch()
    for path in (name, f"{name}/*.jsonl", f"{name}/**/*.jsonl", f"{name}/a.jsonl"):
        assert names(find_files(str(tmp_path / path)), tmp_path) == [f"{name}/a.jsonl"]


def test_folders_that_spark_writes_are_read_and_what_it_did_not_commit_is_not(tmp_path):
    names_of_parts = ["part-0001.json", "part-0000.json"]
    for name in [*names_of_parts, "_SUCCESS", "._SUCCESS.crc", ".part-0000.json.crc", "_temporary/0/part-0000.json"]:
        (tmp_path / "out.json" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out.json" / name).write_text(json.dumps({"text": name}))
    for path in ("", "out.json", "*.json", "**/*.json"):
        source = jsonl_source(str(tmp_path / path))
        assert list(source.read(BadLines())) == ["part-0000.json", "part-0001.json"], path


@pytest.mark.parametrize("pattern", ["", "**/*.jsonl", "*/**/*.jsonl", "**/**/*.jsonl"])
def test_links_that_lead_back_or_to_the_same_file_count_once(tmp_path, pattern):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl").touch()
    # Two links to the folder itself: 2 ** 40 paths for whoever follows them all.
    for name in ("here", "there"):
        (tmp_path / "a" / name).symlink_to(".")
    (tmp_path / "a" / "y.jsonl").symlink_to("x.jsonl")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "broken.jsonl").symlink_to("nowhere")
    assert names(find_files(str(tmp_path / pattern)), tmp_path) == ["a/x.jsonl"]


def test_the_files_of_linked_folders_are_read(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jsonl").touch()
    (tmp_path / "data" / "shards").symlink_to(tmp_path / "elsewhere")
    assert names(find_files(str(tmp_path / "data")), tmp_path) == ["data/shards/x.jsonl"]
