"""The metrics of a run: one JSON object per line of `metrics.jsonl`."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rlm_mhc.checkpoint.weights import abbreviate
from rlm_mhc.disk import replace_file


class MetricsLog:
    """Appends one JSON object per line to a file and keeps them all; going on at `step` drops what came after it.

    A killed run keeps what it logged. What the disk does not take is kept, told of once, and written with the next
    record that it takes; a file that vanished is written anew. Lines that are no records are told of, and left out.
    """

    def __init__(self, file: Path, step: int = 0, say: Callable[[str], object] = print) -> None:
        self.file, self.say, self.failing = file, say, False
        self.records = [r for r in _read(file, say) if r["step"] <= step] if step else []
        self._write_all()

    def write(self, record: dict[str, Any]) -> None:
        """Append a record."""
        self.records.append(record)
        self._attempt(partial(self._append, _line(record)))

    def retry(self) -> None:
        """Write what the disk did not take, so that a checkpoint is not newer than what is logged."""
        if self.failing:
            self._attempt(self._write_all)

    def _attempt(self, write: Callable[[], object]) -> None:
        try:
            write()
            self.failing = False
        except OSError as error:
            if not self.failing:
                self.say(f"{self.file} could not be written: {error}; the training goes on, and tries again")
            self.failing = True

    def _append(self, line: bytes) -> None:
        if self.failing or not self.file.is_file() or self.file.stat().st_size != self._size:
            self._write_all()
            return
        with self.file.open("ab") as file:
            file.write(line)
        self._size += len(line)

    def _write_all(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        content = b"".join(map(_line, self.records))
        replace_file(self.file, lambda file: file.write_bytes(content))
        self._size = len(content)


def by_layer(record: dict[str, Any]) -> dict[str, Any]:
    """A record with what it has of single layers as lists, those of mHC under `mhc/layers`.

    >>> by_layer({"step": 1, "grad_norm/layer_0": 2.0, "mhc/amax/layer_0": 0.5, "mhc/amax/layer_1": 0.7})
    {'step': 1, 'layers': {'grad_norm': [2.0]}, 'mhc/layers': {'amax': [0.5, 0.7]}}
    """
    rest: dict[str, Any] = {}
    layers: dict[str, dict[str, list[Any]]] = {}
    for key, value in record.items():
        name, found, _ = key.partition("/layer_")
        if found:
            group = "mhc/layers" if name.startswith("mhc/") else "layers"
            layers.setdefault(group, {}).setdefault(name.removeprefix("mhc/"), []).append(value)
        else:
            rest[key] = value
    return rest | layers


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def _read(file: Path, say: Callable[[str], object]) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    *lines, rest = file.read_bytes().split(b"\n")
    records = [_record(line) for line in lines]
    if bad := [str(number) for number, record in enumerate(records, start=1) if record is None]:
        say(f"{file}: what is no record of a step is left out: line {abbreviate(bad)}")
    # The last line of a killed run may be half written.
    return [record for record in (*records, _record(rest)) if record is not None]


def _record(line: bytes) -> dict[str, Any] | None:
    """The record in a line, where it holds one that can be written again."""
    try:
        record = json.loads(line)
        _line(record)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None
