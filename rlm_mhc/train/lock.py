"""One run at a time in a folder: a lock that goes with the process that holds it, however that ends."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlm_mhc.disk import lock

LOCK_FILE = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder; where its file system has no locks, go on without.

    The file stays when the lock is let go of: removing it would take it from a process that has opened it meanwhile.

    Raises:
        ValueError: when another process holds it, naming that one.
        OSError: when nothing can be written there.
    """
    with (folder / LOCK_FILE).open("a+", encoding="utf-8") as file:
        if lock(file) is False:
            file.seek(0)
            raise ValueError(
                f"output_dir={folder}: in use by {file.read() or 'another process'}; wait until it ends, or choose "
                "another folder"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
