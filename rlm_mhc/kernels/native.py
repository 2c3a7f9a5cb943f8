"""C++ sources of this package, built once per machine with the compiler that torch.compile needs anyhow."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

FLAGS = ("-O3", "-fno-fast-math", "-march=native", "-std=c++17", "-shared", "-fPIC")


@functools.cache
def load_native(source: Path) -> ctypes.CDLL | None:
    """The library built from a source file, or None where there is no C++ compiler; where building fails, a warning.

    It is kept in `TORCHINDUCTOR_CACHE_DIR`, else in the user's cache folder, under the digest of everything that
    decides what it is. A file or folder that others may write to is not used.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or os.name != "posix":
        return None
    text = source.read_bytes()
    digest = hashlib.sha256(b"\0".join([text, *map(str.encode, (compiler, *FLAGS, _processor()))])).hexdigest()[:16]
    library = cache_folder() / f"{source.stem}-{digest}.so"
    try:
        library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not library.is_file():
            _build(compiler, source, library)
        for path in (library.parent, library):
            if path.stat().st_uid != os.getuid() or path.stat().st_mode & 0o022:
                raise OSError(f"{path}: others may write to it")
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace").strip()
        warnings.warn(f"{source.name} was not built, a slower path serves: {said[-300:]}", stacklevel=2)
        return None


def _build(compiler: str, source: Path, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [*compiler.split(), *FLAGS, str(source), "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        os.replace(built, library)  # whole or not there, whoever else builds it meanwhile


def cache_folder() -> Path:
    """Return the folder for what is built or measured once per machine."""
    if named := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return Path(named) / "native"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlm_mhc"


def _processor() -> str:
    """What -march=native looks at: a folder may be shared by machines that differ."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    model = next((line for line in lines if line.startswith("model name")), platform.processor())
    return f"{platform.machine()} {model} {flags}"
