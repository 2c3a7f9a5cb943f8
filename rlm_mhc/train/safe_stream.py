"""stdout/stderr wrappers that ignore write errors (full disk, closed pipe) and escape what an encoding lacks."""

import os
import re
import sys
from contextlib import suppress
from typing import Any, TextIO

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class SafeStream:
    """A text stream that escapes what its encoding lacks, and drops what it cannot write; otherwise that stream."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write, if that is possible."""
        # ValueError: the file is closed.
        with suppress(OSError, ValueError):
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                self.stream.write(_encodable(text, self.stream.encoding))
        return len(text)

    def flush(self) -> None:
        """Flush, if that is possible."""
        with suppress(OSError, ValueError):
            self.stream.flush()

    def isatty(self) -> bool:
        """Whether it is a terminal; a closed file is none."""
        with suppress(OSError, ValueError):
            return self.stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def install_safe_streams() -> None:
    """Let `print`, bars, warnings and tracebacks of this process go through an `SafeStream`, to its end.

    A stream that the process was started without (`2>&-`) becomes the null device.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if not isinstance(stream, SafeStream):
            setattr(sys, name, SafeStream(stream))
            _escape(stream)


def visible(text: str) -> str:
    r"""Escape control characters other than newline and tab: a terminal would act on them.

    >>> visible("a\x1b[2Jb\x9b\tc")
    'a\\x1b[2Jb\\x9b\tc'
    """
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def _escape(stream: TextIO) -> None:
    """Escape on the stream too: logging handlers hold it directly."""
    if getattr(stream, "errors", None) == "strict":
        with suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]


def _encodable(text: str, encoding: str) -> str:
    return text.encode(encoding, "backslashreplace").decode(encoding)
