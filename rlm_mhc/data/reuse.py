"""Files of a folder made once, and reused while what they were made from is unchanged."""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from rlm_mhc.data.sources import BadLines
from rlm_mhc.disk import replace_file, sync

META_FILE = "meta.json"


def make_or_reuse(
    folder: Path,
    key: list[Any],
    names: Sequence[str],
    write: Callable[[dict[str, BinaryIO]], dict[str, Any]],
    bad: BadLines,
) -> tuple[dict[str, Any], bool]:
    """What `write(files by name)` said of the files, and whether they are those of an earlier call.

    They are where they lie there whole, of the same `key`, and made from no more bad lines than are allowed now.
    What was said has `lines` and `bad`, those of the reading, added to it.

    Raises:
        ValueError: when too many lines are bad; nothing is left to be reused then.
    """
    meta = _read_meta(folder)
    if _whole(folder, meta, key, bad):
        return meta, True
    folder.mkdir(parents=True, exist_ok=True)
    (folder / META_FILE).unlink(missing_ok=True)
    # A run that still maps the former files keeps them: they are replaced, not overwritten.
    temporary = {name: folder / f"{name}.tmp" for name in names}
    with ExitStack() as stack:
        said = write({name: stack.enter_context(path.open("wb")) for name, path in temporary.items()})
    bad.finish()
    for name, path in temporary.items():
        sync(path)
        os.replace(path, folder / name)
    sizes = {name: (folder / name).stat().st_size for name in names}
    meta = said | {"lines": bad.lines, "bad": bad.bad, "key": key, "files": sizes}
    write_whole(folder / META_FILE, json.dumps(meta, indent=2).encode())
    return meta, False


def write_whole(file: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    replace_file(file, lambda path: path.write_bytes(content))


def _whole(folder: Path, meta: dict[str, Any], key: list[Any], bad: BadLines) -> bool:
    if meta.get("key") != key:
        return False
    if meta["bad"] and (bad.strict or meta["bad"] > bad.max_fraction * meta["lines"]):
        return False
    files = ((folder / name, size) for name, size in meta["files"].items())
    return all(file.is_file() and file.stat().st_size == size for file, size in files)


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / META_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
