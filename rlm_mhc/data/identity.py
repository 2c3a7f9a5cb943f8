"""Fingerprint data sources by file contents in reading order, independent of names, paths and times."""

import json
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from rlm_mhc.data.reuse import write_whole
from rlm_mhc.data.sources import Source, digest
from rlm_mhc.disk import checksum

CHECKSUMS_FILE = "checksums.json"
HELD_OUT = "held-out"
# A file may change twice within the timestamp resolution of a file system.
SETTLED_NANOSECONDS = 2_000_000_000


class Identity(NamedTuple):
    """The fingerprints of sources by their content, and by path, size and time, as earlier versions wrote them."""

    content: list[str]
    former: list[str]


def identify(folder: Path, sources: Sequence[Source | None]) -> Identity:
    """Return the identity of sources, None standing for what is held out.

    Every byte of their files is read once: the checksums are stored in `folder`, and a file that has its size and
    times is not read again.

    Raises:
        OSError: when a file cannot be read.
    """
    checksums = _checksums(folder, [file for source in sources if source for file in source.files])

    def content(source: Source) -> str:
        parts = [checksums[file] for file in source.files]
        return digest([source.fingerprint, parts]) if parts else source.fingerprint

    return Identity(
        [content(source) if source else HELD_OUT for source in sources],
        [source.former or source.fingerprint if source else HELD_OUT for source in sources],
    )


def _checksums(folder: Path, files: Iterable[str]) -> dict[str, str]:
    known, now = _read(folder / CHECKSUMS_FILE), time.time_ns()
    states = {file: _state(file) for file in files}
    stored = {file: known.get(os.path.abspath(file), [None, ""]) for file in states}
    found = {file: text for file, (state, text) in stored.items() if state == states[file]}
    missing = [file for file in states if file not in found]
    total = sum(states[file][0] for file in missing)
    with tqdm(desc="checksums of the data", total=total, unit="B", unit_scale=True, delay=2, leave=False) as bar:
        for file in missing:
            found[file] = checksum(Path(file))
            bar.update(states[file][0])
    settled = [file for file in missing if now - states[file][1] > SETTLED_NANOSECONDS]
    if settled:
        known |= {os.path.abspath(file): [states[file], found[file]] for file in settled}
        with suppress(OSError):  # a folder that is only read
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / CHECKSUMS_FILE, json.dumps(known).encode())
    return found


def _state(file: str) -> list[int]:
    found = os.stat(file)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _read(file: Path) -> dict[str, Any]:
    """Return `[state, checksum]` by path, without entries of any other form."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    pairs = rows.items() if isinstance(rows, dict) else ()
    return {path: row for path, row in pairs if isinstance(row, list) and len(row) == 2 and isinstance(row[1], str)}
