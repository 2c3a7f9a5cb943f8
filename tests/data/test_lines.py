"""The end of compressed data comes from their format, and lines before damage are read."""

import gzip
import json
from itertools import pairwise

import numpy as np
import pytest
import zstandard

from rlm_mhc.data import BadLines, jsonl_source
from rlm_mhc.data.lines import read_lines

TEXTS = [f"{word:x}" * 9 for word in np.random.default_rng(0).integers(0, 1 << 60, 3000)]
CONTENT = [
    b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS[start:][:1500]) for start in (0, 1500)
]
ENCODE = {"a.jsonl.gz": gzip.compress, "a.jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress}
# Without a checksum the last bytes of a frame are data.
ENCODE["b.jsonl.zst"] = zstandard.ZstdCompressor(write_checksum=False).compress


def skippable(size):
    return b"\x50\x2a\x4d\x18" + size.to_bytes(4, "little") + bytes(size)


def read(file):
    """The texts of a file, and what is wrong with it."""
    texts = []
    try:
        texts.extend(jsonl_source(str(file)).read(BadLines(strict=False, max_fraction=1.0)))
    except ValueError as error:
        return texts, str(error)
    return texts, ""


@pytest.mark.parametrize("name", ENCODE)
@pytest.mark.parametrize("cut", [1, 3, 4, 5, 20, "two thirds", "second third", "header"])
def test_a_compressed_file_cut_short_is_an_error_after_the_last_line_read(tmp_path, name, cut):
    first, second = (ENCODE[name](content) for content in CONTENT)
    whole = first + second
    lengths = {"two thirds": 2 * len(whole) // 3, "second third": len(first) // 3, "header": len(first) + 3}
    (tmp_path / name).write_bytes(whole[: lengths[cut] if isinstance(cut, str) else -cut])
    texts, error = read(tmp_path / name)
    assert texts == TEXTS[: len(texts)]
    assert f"{name}: cannot be read after line {len(texts)} (" in error
    if cut == "header":
        assert len(texts) == 1500


def test_no_cut_of_a_short_frame_is_taken_for_its_end(tmp_path):
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(b'{"text": "a"}\n')
    file = tmp_path / "a.jsonl.zst"
    for size in range(1, 2 * len(frame) + 1):
        file.write_bytes((frame * 2)[:size])
        texts, error = read(file)
        assert texts == ["a"] * (size // len(frame))
        assert ("cannot be read after line" in error) == (size % len(frame) != 0)


@pytest.mark.parametrize("name", ENCODE)
def test_what_follows_the_data_is_data_or_an_error(tmp_path, name):
    first, second = (ENCODE[name](content) for content in CONTENT)
    (tmp_path / name).write_bytes(first + second)
    assert read(tmp_path / name) == (TEXTS, "")
    for garbage in (b"x", b"garbage", first[:2]):
        (tmp_path / name).write_bytes(first + garbage)
        with pytest.raises(ValueError, match="cannot be read after line 1500 "):
            list(read_lines(str(tmp_path / name)))
    (tmp_path / name).write_bytes(b"")
    assert "the file is empty" in read(tmp_path / name)[1]


def test_frames_without_data_are_passed_over(tmp_path):
    first, second = (ENCODE["a.jsonl.zst"](content) for content in CONTENT)
    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(skippable(9) + first + skippable(0) + ENCODE[file.name](b"") + second + skippable(9000))
    assert read(file) == (TEXTS, "")
    file.write_bytes(first + skippable(9000)[:-1])
    assert "cannot be read after line 1500 " in read(file)[1]


def test_lines_that_cross_frames_are_one(tmp_path):
    encode = ENCODE["a.jsonl.zst"]
    content = CONTENT[0] + CONTENT[1]
    cuts = [0, 7, 8, 5000, 5001, len(content)]
    frames = [encode(content[start:stop]) for start, stop in pairwise(cuts)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert read(tmp_path / "a.jsonl.zst") == (TEXTS, "")


def test_the_longest_window_is_read(tmp_path):
    """`zstd --long=31`; by hand, since to compress with it takes gigabytes."""
    text = b'{"text": "long"}\n'
    header = b"\x28\xb5\x2f\xfd" + bytes([0, (31 - 10) << 3])  # magic, no content size, window of 2 ** 31
    last_raw_block = (1 | len(text) << 3).to_bytes(3, "little")
    (tmp_path / "a.jsonl.zst").write_bytes(header + last_raw_block + text)
    assert read(tmp_path / "a.jsonl.zst") == (["long"], "")
