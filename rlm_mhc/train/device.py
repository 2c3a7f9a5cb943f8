"""The device of a run, and what it has: memory, and the rate of its matrix products."""

import importlib.util
import os
import re
import shutil
import time
from pathlib import Path

import torch

from rlm_mhc.parallel.launch import read_launch

MEMORY_ADVICE = "use training.remat=full, a smaller model or training.batch_size, or a shorter data.max_length"
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
# Dense bf16 rates that the makers name; the first pattern that fits the device's name counts.
DENSE_BF16_FLOPS = {
    r"\bB200\b": 2250e12,
    r"\bH200\b": 989e12,
    r"\bH100 PCIe\b": 756e12,
    r"\bH100 NVL\b": 835e12,
    r"\bH100\b": 989e12,
    r"\bA100\b": 312e12,
    r"\bL40S\b": 362e12,
    r"\bRTX 4090\b": 165e12,
}


def pick_device(name: str) -> torch.device:
    """`cpu`, `cuda`, or for `auto` the CUDA device where there is one; among several ranks this one's own.

    Raises:
        ValueError: when a CUDA device is asked for and there is none, or fewer than processes on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: this machine has no CUDA device that PyTorch can use; use device=cpu or auto")
    if name == "cpu":
        return torch.device(name)
    launch = read_launch()
    # srun --gpus-per-task shows each task its own device alone.
    local = 0 if launch.starter == "srun" and torch.cuda.device_count() == 1 else launch.local
    if local >= torch.cuda.device_count():
        raise ValueError(
            f"device=cuda: this machine has {torch.cuda.device_count()} CUDA devices, too few for a process each; "
            "start torchrun with a smaller --nproc-per-node, or srun with a smaller --ntasks-per-node"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def check_compiler(device: torch.device, wanted: bool) -> None:
    """Refuse `training.compile=true` without the compiler that it needs, before anything is spent.

    Raises:
        ValueError: when there is none.
    """
    if not wanted:
        return
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None or not (
            os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        ):
            raise ValueError(
                "training.compile=true needs triton and a C compiler (gcc or clang) on a CUDA device; "
                "install them or use training.compile=false"
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ValueError(
            "training.compile=true needs a C++ compiler on the CPU (g++ or clang++) and none was found; "
            "install one or use training.compile=false"
        ) from None


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def available_bytes(device: torch.device) -> int | None:
    """Memory that a run may use: what is free on a CUDA device; on a CPU the machine's (or container's), shared by
    the ranks on it.

    None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else "max"
    total = min(total, int(limit)) if limit.isdigit() else total
    return total // read_launch().local_world


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a square matrix product, the best of several runs, measured now.

    Twenty runs, or as many as start within a second: a CPU without fp16 units takes seconds for one.
    """
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
    best, begun = float("inf"), time.perf_counter()
    for _ in range(20):
        start = time.perf_counter()
        if start - begun > 1:
            break
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_rate(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """What `mfu` is counted against: the maker's dense bf16 figure where known, else the measured product rate."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        for name, rate in DENSE_BF16_FLOPS.items():
            if re.search(name, torch.cuda.get_device_name(device)):
                return rate, f"{rate / 1e12:.0f} TFLOP/s by the maker"
    rate = product_rate(device, dtype)
    return rate, f"{rate / 1e9:,.0f} GFLOP/s measured now on a matrix product"
