"""Documents: from JSON lines in files, or from the text that ships with every CPython."""

import glob
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (".jsonl", ".json", ".gz", ".zst")


class Source(NamedTuple):
    """Documents that can be read again from the start: `name` for people, `fingerprint` changing with the content,
    `read()` an iterator of texts."""

    name: str
    fingerprint: str
    read: Callable[[], Iterator[str]]


def builtin_source() -> Source:
    """The documentation topics of `pydoc_data` and the sources of the standard library, about 32 MB of real text.

    It differs between Python versions, not between machines of one version with the same files installed.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path
        for path in library.rglob("*.py")
        if not {"site-packages", "dist-packages", "__pycache__"} & set(path.relative_to(library).parts)
    )
    rows = [(str(path.relative_to(library)), path.stat().st_size) for path in files]

    def read() -> Iterator[str]:
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
        for path in files:
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield text

    name = f"built-in corpus (standard library of Python {platform.python_version()}, {len(files)} files)"
    return Source(name, _digest(["builtin", platform.python_version(), rows]), read)


def jsonl_source(path: str, text_field: str = "text", *, key: str = "data.train_path") -> Source:
    """Documents from JSON lines, `{"<text_field>": "…"}` each, streamed through `datasets`.

    Args:
        path: a file (`.jsonl`, `.jsonl.gz`, `.jsonl.zst`), a folder of such files, or a glob.
        text_field: the field that holds the text.
        key: what the path is called in error messages.

    Raises:
        FileNotFoundError: when nothing matches the path.
        ValueError: while reading, naming file and line, on a line that is not a JSON object with that text.
    """
    files = find_files(path, key)
    rows = [(os.path.abspath(f), os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files]

    def read() -> Iterator[str]:
        for file in files:
            yield from _read_file(file, text_field)

    name = files[0] if len(files) == 1 else f"{path} ({len(files)} files)"
    return Source(name, _digest(["jsonl", text_field, rows]), read)


def find_files(path: str, key: str = "data.train_path") -> list[str]:
    """The data files that a path, folder or glob stands for, sorted.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: on a single file with an unknown ending.
    """
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        found = [f for f in glob.glob(os.path.join(path, "**", "*"), recursive=True) if f.endswith(SUFFIXES)]
        if not found:
            raise FileNotFoundError(f"{key}={path}: the folder has no file ending in {', '.join(SUFFIXES)}")
        return sorted(found)
    if os.path.isfile(path):
        if not path.endswith(SUFFIXES):
            raise ValueError(f"{key}={path}: expected a file ending in {', '.join(SUFFIXES)}")
        return [path]
    found = sorted(f for f in glob.glob(path, recursive=True) if os.path.isfile(f))
    if not found:
        raise FileNotFoundError(f"{key}={path}: no such file or folder, and no file matches it as a pattern")
    return found


def _read_file(file: str, text_field: str) -> Iterator[str]:
    number = 0
    for number, line in enumerate(_lines(file), start=1):
        if line.strip("\ufeff \t\r\n"):
            yield _document(line.removeprefix("\ufeff"), text_field, f"{file}, line {number}")
    if number == 0:
        raise ValueError(f'{file}: the file is empty; expected one JSON object per line, {{"{text_field}": "…"}}')


def _lines(file: str) -> Iterator[str]:
    from datasets import load_dataset
    from datasets.utils.logging import set_verbosity_error

    set_verbosity_error()
    if os.path.getsize(file) == 0:
        return
    try:
        # Lines as text, not datasets' JSON reader: that one cannot say which line is wrong.
        rows: Any = load_dataset("text", data_files=[glob.escape(file)], split="train", streaming=True)
        for batch in rows.iter(batch_size=1000):
            yield from batch["text"]
    except UnicodeDecodeError:
        raise ValueError(
            f"{file}: not UTF-8 text but binary, compressed or in another encoding; expected JSON lines in UTF-8"
        ) from None
    except (OSError, EOFError, RuntimeError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); is it damaged or compressed under a wrong name?") from None
    except Exception as error:
        if type(error).__name__ != "ZstdError" and type(error).__module__ != "zlib":
            raise
        raise ValueError(f"{file}: cannot be decompressed ({error})") from None


def _document(line: str, text_field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        if "\0" in line:
            raise ValueError(f"{where}: binary data, not JSON; expected one JSON object per line") from None
        raise ValueError(f'{where}: not JSON ({error}); expected {{"{text_field}": "…"}}') from None
    if not isinstance(record, dict):
        raise ValueError(f'{where}: expected a JSON object {{"{text_field}": "…"}}, got {type(record).__name__}')
    if text_field not in record:
        fields = ", ".join(map(repr, list(record)[:5])) or "none"
        raise ValueError(f"{where}: no field '{text_field}' (fields: {fields}); set data.text_field to the right one")
    if not isinstance(record[text_field], str):
        raise ValueError(f"{where}: field '{text_field}' is not a string but {type(record[text_field]).__name__}")
    # A lone half of a surrogate pair is legal JSON but no text: it becomes the replacement character.
    return record[text_field].encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
