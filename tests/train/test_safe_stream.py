"""What cannot be written is escaped or dropped; it ends nothing."""

import io
import logging
import os
import sys
import warnings

import pytest
from tqdm import tqdm

from rlm_mhc.train.safe_stream import SafeStream, install_safe_streams, visible

TEXT = "compiling 1/6: head … → 数学 \udcff Ünïcödé"


def stream(encoding, errors="strict"):
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors, write_through=True)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape", "surrogatepass", "replace", "xmlcharrefreplace"])
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii", "utf-8", "utf-16", "cp932"])
def test_what_an_encoding_lacks_is_escaped_and_the_rest_is_as_it_was(encoding, errors):
    under = stream(encoding, errors)
    assert SafeStream(under).write(TEXT) == len(TEXT)
    written = under.buffer.getvalue().decode(encoding, "replace")
    assert written.startswith("compiling 1/6: head ")
    if errors == "strict":
        assert written == TEXT.encode(encoding, "backslashreplace").decode(encoding)


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    flush = isatty = lambda self: (_ for _ in ()).throw(OSError(28, "No space left on device"))


def closed():
    file = stream("utf-8")
    file.close()
    return file


@pytest.mark.parametrize("under", [Broken, closed])
def test_a_file_that_is_closed_full_or_without_a_reader_is_written_to_in_vain(under):
    outlet = SafeStream(under())
    assert outlet.write("a") == 1
    outlet.flush()
    assert not outlet.isatty()
    print("a", file=outlet, flush=True)


@pytest.mark.parametrize("make", [lambda: stream("ascii"), closed, Broken, lambda: None])
def test_bars_warnings_and_logs_end_nothing_either(monkeypatch, make):
    under = make()
    monkeypatch.setattr(sys, "stdout", under)
    monkeypatch.setattr(sys, "stderr", under)
    handler = logging.StreamHandler(under)  # as libraries make theirs, before a recipe starts
    install_safe_streams()
    record = logging.LogRecord("a", logging.ERROR, __file__, 1, TEXT, (), None)
    print(TEXT, flush=True)
    with tqdm(total=1, desc=TEXT) as bar:
        tqdm.write(TEXT)
        bar.update()
    # As `warnings` writes; a warning would be recorded by pytest, which cannot send a surrogate to another process.
    sys.stderr.write(warnings.formatwarning(TEXT, UserWarning, __file__, 1))
    handler.handle(record)
    sys.excepthook(ValueError, ValueError(TEXT), None)
    sys.stdout.flush()
    if under is not None and under.__class__ is io.TextIOWrapper and not under.closed:
        written = under.buffer.getvalue().decode()
        assert "--- Logging error ---" not in written
        assert written.count(r"\u2026 \u2192 \u6570\u5b66 \udcff \xdcn\xefc\xf6d\xe9") >= 6


def test_safe_streams_are_installed_once_and_a_missing_stream_becomes_the_null_device(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", stream("utf-8"))
    install_safe_streams()
    first = sys.stdout, sys.stderr
    install_safe_streams()
    assert (sys.stdout, sys.stderr) == first
    assert sys.stdout.stream.name == os.devnull


def test_control_characters_are_made_visible_and_layout_stays():
    assert visible("\x1b]0;title\x07 \x9b2J\r\x00\x7f") == r"\x1b]0;title\x07 \x9b2J\x0d\x00\x7f"
    assert visible("a\tb\n数学 é\xa0\udcff") == "a\tb\n数学 é\xa0\udcff"
