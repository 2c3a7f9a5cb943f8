import json
import math
from pathlib import Path

import pytest

from rlm_mhc.train import draw_curves
from rlm_mhc.train.log import MetricsLog

RECORDS = [
    {"step": 0, "eval/loss": 8.0},
    {
        "step": 1,
        "train/loss": 8.1,
        "train/lr": 1e-3,
        "grad_norm": 2.0,
        "mhc/gain_forward": 1.0,
        "mhc/gain_backward": 1.1,
    },
    {
        "step": 2,
        "train/loss": 7.1,
        "train/lr": 2e-3,
        "grad_norm": 1.0,
        "mhc/gain_forward": 1.0,
        "mhc/gain_backward": 1.2,
    },
]


def test_metrics_are_one_object_per_line_and_survive_a_cut_off_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    log = MetricsLog(file)
    for record in RECORDS:
        log.write(record)
    assert [json.loads(line) for line in file.read_text().splitlines()] == RECORDS
    with file.open("a") as f:
        f.write('{"step": 3, "train/lo')
    resumed = MetricsLog(file, 1)
    assert resumed.records == RECORDS[:2]
    resumed.write(RECORDS[2])
    assert [json.loads(line) for line in file.read_text().splitlines()] == RECORDS


@pytest.mark.parametrize(
    "line", [b"nonsense", b"7", b"[]", b"\xff", b"{}", b'{"step": "2"}', b'{"step": 2, "a": NaN}', b"[" * 10**5]
)
def test_a_line_that_is_no_record_is_told_of_and_takes_no_other_with_it(tmp_path, line):
    file, said = tmp_path / "metrics.jsonl", []
    lines = [json.dumps(record).encode() for record in RECORDS]
    file.write_bytes(b"\n".join([*lines[:1], line, *lines[1:], b'{"step": 3, "tr']))
    assert MetricsLog(file, 2, said.append).records == RECORDS
    assert said == [f"{file}: what is no record of a step is left out: line 2"]


def test_what_the_disk_did_not_take_is_written_when_it_does(tmp_path, monkeypatch):
    file, said = tmp_path / "metrics.jsonl", []
    log = MetricsLog(file, say=said.append)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        log.write(RECORDS[0])
        log.write(RECORDS[1])
    assert said == [
        f"{file} could not be written: [Errno 28] No space left on device; the training goes on, and tries again"
    ]
    assert file.read_bytes() == b""
    log.retry()
    assert [json.loads(line) for line in file.read_text().splitlines()] == RECORDS[:2]


def full(*_, **__):
    raise OSError(28, "No space left on device")


LAYERED = [r | {"mhc/layers": {"gain_backward": [1.0 + r["step"], 1.0, math.inf]}} for r in RECORDS]


@pytest.mark.parametrize("records", [[], RECORDS[:1], RECORDS, LAYERED[:1], LAYERED])
def test_curves_are_a_picture_at_any_time(tmp_path, records):
    draw_curves(records, tmp_path / "curves.png", "a title")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]
