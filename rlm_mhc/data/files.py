"""Find the files of a data set below a path, a folder or a glob pattern."""

import glob
import os
import re
from collections.abc import Iterator

SUFFIXES = (".jsonl", ".json", ".gz", ".zst")
# Output of Hadoop and Spark jobs that is not committed: copies of what is, or parts of a failed attempt.
UNCOMMITTED = "_temporary"


def find_files(path: str, key: str = "data.train_path") -> list[str]:
    """Return the data files that a path, folder or glob pattern stands for, sorted, each file once.

    Links are followed, and a file or folder that several of them lead to counts once. Hidden files are left out.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: on a single file with an unknown ending.
    """
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        found = [file for folder in _folders(path) for file in _data_files(folder)]
        if not found:
            raise FileNotFoundError(f"{key}={path}: the folder has no file ending in {', '.join(SUFFIXES)}")
        return _once(found)
    if os.path.isfile(path):
        if not path.endswith(SUFFIXES):
            raise ValueError(f"{key}={path}: expected a file ending in {', '.join(SUFFIXES)}")
        return [path]
    found = [file for match in _matches(_literal_start(path)) for file in _files_of(match)]
    if not found:
        raise FileNotFoundError(f"{key}={path}: no such file or folder, and no file matches it as a pattern")
    return _once(found)


def _files_of(match: str) -> list[str]:
    """Return a matched file, or the files of a matched folder that is named like one, as Spark writes its output."""
    if os.path.isdir(match) and match.endswith(SUFFIXES):
        return [file for folder in _folders(match) for file in _data_files(folder)]
    return [match] if os.path.isfile(match) else []


def _folders(top: str) -> Iterator[str]:
    """Yield a folder and those below it; links are followed, but no folder is entered twice."""
    entered = set()
    for folder, names, _ in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:
            names.clear()
            continue
        entered.add(real)
        names[:] = sorted(name for name in names if not name.startswith(".") and name != UNCOMMITTED)
        yield folder


def _data_files(folder: str) -> list[str]:
    names = (name for name in os.listdir(folder) if name.endswith(SUFFIXES) and not name.startswith("."))
    return [file for name in names if os.path.isfile(file := os.path.join(folder, name))]


def _matches(pattern: str) -> Iterator[str]:
    """Yield what `glob.glob(pattern, recursive=True)` does, but let `**` enter no folder twice."""
    before, stars, after = _at_stars(pattern)
    if not stars:
        yield from glob.iglob(pattern)
        return
    for top in glob.iglob(before) if before else [os.curdir]:
        for folder in _folders(top) if os.path.isdir(top) else ():
            inner = folder if before else folder.removeprefix(os.curdir).removeprefix(os.sep)
            yield from _matches(os.path.join(glob.escape(inner), after or "*"))


def _at_stars(pattern: str) -> tuple[str, str, str]:
    """Split a pattern at its first component `**`."""
    found = re.search(r"(?:^|(?<=/))\*\*(?:/|$)", pattern)
    return (pattern[: found.start()], "**", pattern[found.end() :]) if found else (pattern, "", "")


def _literal_start(pattern: str) -> str:
    """Escape the folders that a pattern begins with and that exist under the very name, as `set[v1]` may."""
    start, rest = pattern, ""
    while start and not os.path.isdir(start):
        start, name = os.path.split(start)
        rest = os.path.join(name, rest) if rest else name
    return os.path.join(glob.escape(start), rest)


def _once(files: list[str]) -> list[str]:
    """Sort files; of several names for one file the first stays."""
    names: dict[str, str] = {}
    for file in sorted(files):
        names.setdefault(os.path.realpath(file), file)
    return list(names.values())
