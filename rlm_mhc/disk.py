"""Files that are whole or absent, also after a crash: written beside their place, flushed to the disk, renamed."""

import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

BLOCK_BYTES = 1 << 22
CHECKSUM = "xxh3_128"


def replace_file(file: Path, write: Callable[[Path], object], *, durable: bool = True) -> None:
    """Let `write(path)` write a temporary sibling, then put it in the place of `file`.

    Whoever reads, and whoever is killed, finds the former file or the new one, whole, with the permissions of any
    other new file. With `durable` that holds for a power failure too.

    Raises:
        OSError: when it cannot be written; nothing of it is left then.
    """
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch()
        permissions = stat.S_IMODE(temporary.stat().st_mode)
        write(temporary)
        temporary.chmod(permissions)  # some writers make theirs private
        if durable:
            sync(temporary)
        os.replace(temporary, file)
        if durable:
            sync(file.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def new_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill(path)` fill a temporary sibling, then put it in the place of `folder`, which is missing or empty.

    Whoever is killed, also by a power failure, leaves it whole or as it was.

    Raises:
        ValueError: when there is something in it.
        OSError: when it cannot be written; nothing of it is left then.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: already there, and not an empty folder; name another one, or remove it")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        sync_tree(temporary)
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, so that a power failure does not take them back; one that is there stays."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def discard(path: Path) -> None:
    """Remove a file, a link or a folder, as much of it as the system lets us; what a link points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()


def lock(file: IO[Any], *, wait: bool = False) -> bool | None:
    """Whether this process now holds the lock of an open file, to its end or that of the file; None where the system or
    the file system has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk; where a system cannot flush folders, do nothing."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush every file below a folder, and the folders."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def text_lines(content: bytes, where: str) -> list[str]:
    r"""Return the lines of a UTF-8 text, without a byte order mark; a line ends at `\n` or `\r\n`, and at nothing else
    that `str.splitlines` splits at, as U+2028 or a form feed.

    Args:
        content: the bytes of the text.
        where: the name of the file, for errors.

    Raises:
        ValueError: naming the file, when it is not UTF-8.

    >>> text_lines(b"\xef\xbb\xbfone\x0c two\r\nthree\n", "file")
    ['one\x0c two', 'three']
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start} ({error.reason}); save it as UTF-8") from None
    lines = text.replace("\r\n", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def checksum(file: Path) -> str:
    """The XXH3 digest of a file's content, of 128 bits as hexadecimal: it finds damage, not malice.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     checksum(Path(file.name))
    '99aa06d3014798d86001c324468d497f'
    """
    import xxhash

    digest = xxhash.xxh3_128()
    with file.open("rb") as content:
        while block := content.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
