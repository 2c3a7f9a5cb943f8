"""C++ sources of this package, built once per machine with the compiler that torch.compile needs anyhow."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")


@functools.cache
def load_native(source: Path) -> ctypes.CDLL | None:
    """The library built from a source file, or None where there is no C++ compiler or it fails.

    It is kept in torch's compile cache (`TORCHINDUCTOR_CACHE_DIR`, else the user's folder for temporary files),
    under the digest of everything that decides what it is.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or os.name != "posix":
        return None
    text = source.read_bytes()
    digest = hashlib.sha256(b"\0".join([text, *map(str.encode, (compiler, *FLAGS, _processor()))])).hexdigest()[:16]
    library = _cache() / f"{source.stem}-{digest}.so"
    try:
        if not library.is_file():
            _build(compiler, source, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError):
        return None


def _build(compiler: str, source: Path, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [*compiler.split(), *FLAGS, str(source), "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        os.replace(built, library)  # whole or not there, whoever else builds it meanwhile


def _cache() -> Path:
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    user = os.environ.get("USER") or str(os.getuid())
    return Path(named or Path(tempfile.gettempdir()) / f"rlm_mhc_{user}") / "native"


def _processor() -> str:
    """What -march=native looks at: a folder may be shared by machines that differ."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    model = next((line for line in lines if line.startswith("model name")), platform.processor())
    return f"{platform.machine()} {model} {flags}"
