"""Lines of a file, plain or compressed; a compressed file ends where its format says so, not where its bytes do."""

import gzip
import io
import zlib
from collections.abc import Iterator
from typing import IO, Any

MAX_LINE_BYTES = 1 << 26
PIECE_BYTES = 1 << 20
BUFFER_BYTES = 1 << 17
# The largest window that the format has (zstd --long=31).
LARGEST_WINDOW = 1 << 31
# A block of 4 bytes may expand to 128 KiB, this much to 256 MiB.
COMPRESSED_PIECE_BYTES = 1 << 13


def read_lines(file: str) -> Iterator[bytes | None]:
    """Yield the lines of a file; None in place of one longer than `MAX_LINE_BYTES`, which is never in memory whole.

    Raises:
        ValueError: when the file cannot be read to its end, saying after which line.
    """
    import zstandard

    number = 0
    try:
        with _open(file) as content:
            while line := content.readline(MAX_LINE_BYTES + 1):
                number += 1
                whole = len(line) <= MAX_LINE_BYTES
                yield line if whole else None
                while not whole and line and not line.endswith(b"\n"):
                    line = content.readline(PIECE_BYTES)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{file}: cannot be read after line {number} ({reason}); is it damaged or compressed under a wrong name?"
        ) from None


class ZstdFrames(io.RawIOBase):
    """Decompress concatenated zstd frames.

    zstandard's own `stream_reader` gives `b""` at the end of its input also inside a frame.

    Raises:
        EOFError: while reading, when the stream ends inside a frame.
        zstandard.ZstdError: while reading, on what is no frame.
    """

    def __init__(self, content: IO[bytes]) -> None:
        import zstandard

        self.content = content
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
        self.frame: Any = None
        self.compressed, self.ready = b"", memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as one piece reaches; return how many bytes that are, 0 at the end."""
        while not self.ready:
            self.compressed = self.compressed or self.content.read(COMPRESSED_PIECE_BYTES)
            if not self.compressed:
                break
            self.ready = memoryview(self._decompress())
        if not self.ready and self.frame is not None:
            raise EOFError("the file ends inside a compressed frame")
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count

    def close(self) -> None:
        """Close the stream too."""
        self.content.close()
        super().close()

    def _decompress(self) -> bytes:
        """Decompress the buffered bytes, up to the end of the frame."""
        if self.frame is None:
            self.frame = self.decompressor.decompressobj()
        text = self.frame.decompress(self.compressed)
        self.compressed = self.frame.unused_data
        if self.frame.eof:
            self.frame = None
        return text


def _open(file: str) -> IO[bytes]:
    if file.endswith(".gz"):
        return gzip.open(file, "rb")  # type: ignore[return-value]
    content = open(file, "rb")  # noqa: SIM115
    return io.BufferedReader(ZstdFrames(content), BUFFER_BYTES) if file.endswith(".zst") else content
