"""Documents: from JSON lines in files, or from the text that ships with every CPython."""

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rlm_mhc.data.files import find_files
from rlm_mhc.data.lines import MAX_LINE_BYTES, read_lines

NAMED_BAD_LINES = 5
LINES_TO_JUDGE_BY = 1000


class SetupError(ValueError):
    """What is wrong is not the line that was read but how all are to be read."""


class BadLines:
    """Counts the lines of a source as they are read, skips the bad ones, and ends the reading where they are too many.

    Args:
        strict: whether the first bad line ends it.
        max_fraction: the share of the lines that may be bad, looked at from line 1000 on, and by `finish`.
        say: told of the first few.
    """

    def __init__(
        self, *, strict: bool = True, max_fraction: float = 0.0, say: Callable[[str], object] = lambda line: None
    ) -> None:
        self.strict, self.max_fraction, self.say = strict, max_fraction, say
        self.lines, self.bad, self.first, self.empty_files = 0, 0, "", 0

    def skip(self, error: ValueError, *, counted: bool = False) -> None:
        """Count a line that `error` says is bad; `counted`: it is among the lines already, as a good one.

        Raises:
            ValueError: that error, where the source is read strictly; or that there are too many.
        """
        if self.strict:
            raise error
        self.lines += not counted
        self.bad, self.first = self.bad + 1, self.first or str(error)
        if self.bad <= NAMED_BAD_LINES:
            self.say(f"bad line     {error}; skipped")
        if self.lines >= LINES_TO_JUDGE_BY:
            self.finish()

    def skip_file(self, error: ValueError) -> None:
        """Count a file without a line.

        Raises:
            ValueError: that error, where the source is read strictly.
        """
        if self.strict:
            raise error
        self.empty_files += 1
        if self.empty_files <= NAMED_BAD_LINES:
            self.say(f"empty file   {error}; skipped")

    def finish(self) -> None:
        """Judge by all that was read.

        Raises:
            ValueError: when too many lines are bad.
        """
        if self.bad > self.max_fraction * self.lines:
            raise ValueError(
                f"{self.bad} of {self.lines} lines are bad, more than data.max_bad_fraction={self.max_fraction:g} "
                f"allows; the first: {self.first}"
            )


class Source(NamedTuple):
    """Documents or examples that can be read again from the start.

    `name` is for people. `read(bad)` yields texts, or what a `Parse` returns, and reports bad lines to a `BadLines`.
    The identity of a source is its `fingerprint` together with the content of `files`, in the order of reading (see
    `rlm_mhc.data.identity`). `former` is the fingerprint by path, size and time that earlier versions wrote.
    """

    name: str
    fingerprint: str
    read: Callable[[BadLines], Iterator[Any]]
    files: tuple[str, ...] = ()
    former: str = ""


class Parse(NamedTuple):
    """What a JSON object stands for: `read(record, where)`, which raises a `ValueError` that begins with `where`;
    what is `expected`, in errors; and a `key` that changes with the result."""

    read: Callable[[dict[str, Any], str], Any]
    expected: str
    key: Any


def builtin_source() -> Source:
    """Return the documentation topics of `pydoc_data` and the sources of the standard library, about 32 MB of text.

    It differs between Python versions, not between machines of one version with the same files installed.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path
        for path in library.rglob("*.py")
        if not {"site-packages", "dist-packages", "__pycache__"} & set(path.relative_to(library).parts)
    )
    rows = [(str(path.relative_to(library)), path.stat().st_size) for path in files]

    def read(bad: BadLines) -> Iterator[str]:
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
        for path in files:
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield text

    name = f"built-in corpus (standard library of Python {platform.python_version()}, {len(files)} files)"
    former = digest(["builtin", platform.python_version(), rows])
    return Source(name, digest(["builtin"]), read, tuple(map(str, files)), former)


def jsonl_source(path: str, text_field: str = "text", *, key: str = "data.train_path") -> Source:
    """Documents from JSON lines, `{"<text_field>": "…"}` each, streamed; see `record_source`."""
    return record_source(path, text_parse(text_field), key=key)


def record_source(path: str, parse: Parse, *, key: str = "data.train_path") -> Source:
    """What JSON lines stand for, streamed.

    Args:
        path: a file (`.jsonl`, `.jsonl.gz`, `.jsonl.zst`), a folder of such files, or a glob; see `find_files`.
        parse: what to make of a line.
        key: what the path is called in error messages.

    Raises:
        FileNotFoundError: when nothing matches the path.
        ValueError: while reading, on a file that cannot be read to its end, when all files are empty, and as `BadLines`
            has it on an empty file or a line that is not a JSON object that `parse` takes.
    """
    files = find_files(path, key)
    rows = [(os.path.abspath(f), os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files]

    name = files[0] if len(files) == 1 else f"{path} ({len(files)} files)"

    def read(bad: BadLines) -> Iterator[Any]:
        lines = 0
        for file in files:
            lines += yield from _read_file(file, parse, bad)
        if not lines:
            raise ValueError(f"{name}: {_empty(parse, files)}")

    return Source(name, digest(["jsonl", parse.key]), read, tuple(files), digest(["jsonl", parse.key, rows]))


def text_parse(field: str) -> Parse:
    """The text in a field.

    >>> text_parse("text").read({"text": "a"}, "line 1")
    'a'
    """

    def read(record: dict[str, Any], where: str) -> str:
        return string_field(record, field, where, "set data.text_field to the right one")

    return Parse(read, f'{{"{field}": "…"}}', field)


def string_field(record: dict[str, Any], field: str, where: str, remedy: str) -> str:
    """The text in a field of a record.

    Raises:
        ValueError: beginning with `where`, when there is none.
    """
    if field not in record:
        fields = ", ".join(map(repr, list(record)[:5])) or "none"
        raise ValueError(f"{where}: no field '{field}' (fields: {fields}); {remedy}")
    if not isinstance(record[field], str):
        raise ValueError(f"{where}: field '{field}' is not a string but {type(record[field]).__name__}")
    return whole_characters(record[field])


def whole_characters(text: str) -> str:
    """The text with the replacement character for each lone half of a surrogate pair, which is legal JSON, no text."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_file(file: str, parse: Parse, bad: BadLines) -> Generator[Any, None, int]:
    """Yield what the lines of a file stand for; return how many lines it has."""
    number = 0
    for number, line in enumerate(read_lines(file), start=1):
        if line is not None and not line.strip(b"\xef\xbb\xbf \t\r\n"):
            continue
        where = f"{file}, line {number}"
        try:
            parsed = _parsed(line, where, parse)
        except SetupError:
            raise
        except ValueError as error:
            bad.skip(error)
            continue
        bad.lines += 1
        yield parsed
    if number == 0:
        bad.skip_file(ValueError(f"{file}: {_empty(parse, [file])}"))
    return number


def _empty(parse: Parse, files: list[str]) -> str:
    what = "all files are" if files[1:] else "the file is"
    return f"{what} empty; expected one JSON object per line, {parse.expected}"


def _parsed(line: bytes | None, where: str, parse: Parse) -> Any:
    try:
        return parse.read(_record(line, where, parse.expected), where)
    except RecursionError:
        raise ValueError(f"{where}: nested too deep; expected {parse.expected}") from None


def _record(line: bytes | None, where: str, expected: str) -> dict[str, Any]:
    if line is None:
        raise ValueError(f"{where}: longer than {MAX_LINE_BYTES >> 20} MiB; expected one JSON object per line")
    try:
        record = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode())
    except UnicodeDecodeError:
        raise ValueError(
            f"{where}: not UTF-8 text but binary, compressed or in another encoding; expected JSON lines in UTF-8"
        ) from None
    except ValueError as error:
        if b"\0" in line:
            raise ValueError(f"{where}: binary data, not JSON; expected one JSON object per line") from None
        cut = "" if line.endswith(b"\n") else "; it ends without a line break: is the file cut short?"
        raise ValueError(f"{where}: not JSON ({error}); expected {expected}{cut}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object {expected}, got {type(record).__name__}")
    return record


def digest(content: Any) -> str:
    """Return a fingerprint of JSON values."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
