"""Seconds that a call takes, and what a result was measured with."""

import datetime
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from rlm_mhc.train.device import describe

FASTEST_CLOCK = 3e9  # cycles per second, more than those of any GPU


def timed(call: Callable[[], object], device: torch.device, count: int = 1) -> float:
    """Seconds per call of `count` calls, what a CUDA device does for them included.

    >>> timed(lambda: None, torch.device("cpu")) >= 0
    True
    """
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / count


def busy(call: Callable[[], object], device: torch.device, count: int = 1) -> float:
    """Seconds per call that a CUDA device works on `count` calls; on another device as `timed`.

    The device is kept waiting until all of them are launched, so that it never waits for a launch in between.

    >>> busy(lambda: None, torch.device("cpu")) >= 0
    True
    """
    seconds = timed(call, device, count)
    if device.type != "cuda":
        return seconds
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(seconds * count * FASTEST_CLOCK))
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / count


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy of a large tensor reads and writes, the best of several."""
    source = torch.empty((1 << 30) if device.type == "cuda" else (1 << 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(busy(lambda: target.copy_(source), device) for _ in range(10))


def provenance(device: torch.device, packages: Iterable[str]) -> dict[str, Any]:
    """Date, command line, device, processor, and the versions of Python and of those packages that are installed."""
    versions = {package: _version(package) for package in packages}
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "device": describe(device),
        "processor": _processor(),
        "versions": {"python": platform.python_version(), **{name: v for name, v in versions.items() if v}},
    }


def write_result(folder: str | Path, name: str, result: dict[str, Any]) -> Path:
    """Write a result as JSON into a folder, made if it is missing; returns the file."""
    file = Path(folder) / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return file


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
