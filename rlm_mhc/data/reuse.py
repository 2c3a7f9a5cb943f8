"""Files of a folder made once, and reused while what they were made from is unchanged."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from rlm_mhc.data.sources import BadLines
from rlm_mhc.disk import CHECKSUM, discard, lock, replace_file, sync

META_FILE, LOCK_FILE, TEMPORARY = "meta.json", ".tokens.lock", ".making-"
SAMPLES, SAMPLE_BYTES = 256, 1 << 20


@contextmanager
def locked(folder: Path, say: Callable[[str], object]) -> Iterator[None]:
    """Have a folder to oneself, made if it is missing: to be held until its files are open.

    Another process that asks for it waits, and then finds what this one made. What a killed one was making is removed.
    A folder that takes no lock, being read-only or of a file system that has none, is used without: what is made there
    is still made under names of its own, and compared with its checksum when it is reused.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((folder / LOCK_FILE).open("ab"))
            if (held := lock(file)) is False:
                say(f"waiting      for another process that uses {folder}")
                held = lock(file, wait=True)
            for stale in folder.glob(f"{TEMPORARY}*") if held else ():
                discard(stale)
        yield


def make_or_reuse(
    folder: Path,
    key: list[Any],
    names: Sequence[str],
    write: Callable[[dict[str, BinaryIO]], dict[str, Any]],
    bad: BadLines,
    former: list[Any] | None = None,
) -> tuple[dict[str, Any], bool]:
    """Return what `write(files by name)` returned, and whether the files are those of an earlier call.

    Files are reused where they are whole, have the same `key`, or the `former` one that an earlier version wrote, and
    were made from no more bad lines than are allowed now. `lines`, `bad` and `empty_files` of the reading are added to
    what is returned. To be called with the folder `locked`.

    Raises:
        ValueError: when too many lines are bad; nothing is left to be reused then.
        OSError: when they cannot be written; nothing of them is left then.
    """
    meta = _read_meta(folder)
    if meta.get("key") in (key, former or key) and _whole(folder, meta, names, bad):
        if meta["key"] != key:
            with suppress(OSError):  # a folder that is only read
                _write_meta(folder, meta | {"key": key})
        return meta, True
    folder.mkdir(parents=True, exist_ok=True)
    (folder / META_FILE).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=folder) as temporary:
        made = {name: Path(temporary, name) for name in names}
        with ExitStack() as stack:
            said = write({name: stack.enter_context(path.open("wb")) for name, path in made.items()})
        bad.finish()
        files = {name: described(path) for name, path in made.items()}
        # A run that still maps the former files keeps them: they are replaced, not overwritten.
        for name, path in made.items():
            sync(path)
            os.replace(path, folder / name)
    read = {"lines": bad.lines, "bad": bad.bad, "empty_files": bad.empty_files}
    meta = said | read | {"key": key, "files": files}
    _write_meta(folder, meta)
    return meta, False


def described(file: Path) -> dict[str, Any]:
    """The size of a file, and a checksum of its content: of all of it up to 256 MiB, of a larger one that of as many
    blocks of 1 MiB, evenly spread from its start to its end.

    So a start takes a fraction of a second whatever the size, and tells other tokens or a missing part, not each byte.
    """
    import xxhash

    size, digest = file.stat().st_size, xxhash.xxh3_128()
    spacing = max(SAMPLE_BYTES, (size - SAMPLE_BYTES) // (SAMPLES - 1))
    with file.open("rb") as content:
        for start in range(0, min(size, SAMPLES * spacing), spacing):
            content.seek(start)
            digest.update(content.read(SAMPLE_BYTES))
    return {"size": size, CHECKSUM: digest.hexdigest()}


def write_whole(file: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    replace_file(file, lambda path: path.write_bytes(content))


def _whole(folder: Path, meta: dict[str, Any], names: Sequence[str], bad: BadLines) -> bool:
    if bad.strict and (meta["bad"] or meta.get("empty_files")):
        return False
    if meta["bad"] > bad.max_fraction * meta["lines"]:
        return False
    files = {name: folder / name for name in names}
    there = all(file.is_file() for file in files.values())
    return there and meta["files"] == {name: described(file) for name, file in files.items()}


def _write_meta(folder: Path, meta: dict[str, Any]) -> None:
    write_whole(folder / META_FILE, json.dumps(meta, indent=2).encode())


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}
