"""Standard output and standard error that end nothing: not by a full disk, nor by a pipe whose reader is gone."""

import sys
from contextlib import suppress
from typing import Any, TextIO


class Outlet:
    """A text stream that drops what it cannot write; in all else the stream that it is made from."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write, if that is possible."""
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, if that is possible."""
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def install_outlets() -> None:
    """Let `print`, bars and tracebacks of this process go through an `Outlet`, to its end."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)  # None where the process was started without
        if stream is not None and not isinstance(stream, Outlet):
            setattr(sys, name, Outlet(stream))
