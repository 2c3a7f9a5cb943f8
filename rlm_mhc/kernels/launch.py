"""Where the Triton kernels can run, and what every launch of theirs needs."""

import contextlib
import importlib.util
import os
from contextlib import AbstractContextManager

import torch
from torch import Tensor

LEAST_CAPABILITY = (8, 0)
MOST_STREAMS, WIDTH_MULTIPLE, MOST_ITERATIONS = 16, 16, 64
STREAM_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def require_triton(device: torch.device) -> None:
    """Refuse a device that the Triton kernels do not run on.

    Raises:
        ValueError: without the package, on a CPU outside its interpreter, or below compute capability 8.0.
    """
    if importlib.util.find_spec("triton") is None:
        raise ValueError("triton is not installed: pip install 'rlm-mhc[gpu]', or use kernels=reference")
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            raise ValueError(
                f"compute capability {capability[0]}.{capability[1]}: the Triton kernels need 8.0 or later; "
                "use kernels=reference"
            )
    elif not interpreted():
        raise ValueError(
            f"device {device.type}: the Triton kernels run on CUDA, and elsewhere in Triton's interpreter alone "
            "(TRITON_INTERPRET=1); use kernels=reference"
        )


def require_streams(streams: Tensor) -> None:
    """Refuse streams that the kernels are not made for.

    Raises:
        ValueError: unless they are `[*b, n, c]` in bf16, fp16 or fp32, with n from 1 to 16 and c a multiple of 16.
    """
    if streams.dtype not in STREAM_DTYPES:
        raise ValueError(f"streams in {streams.dtype}: the Triton kernels take bf16, fp16 and fp32")
    if streams.dim() < 2 or not 1 <= streams.shape[-2] <= MOST_STREAMS:
        raise ValueError(f"streams {list(streams.shape)}: expected [*b, n, c] with n from 1 to {MOST_STREAMS}")
    if streams.shape[-1] < 1 or streams.shape[-1] % WIDTH_MULTIPLE:
        raise ValueError(f"width {streams.shape[-1]}: the Triton kernels take multiples of {WIDTH_MULTIPLE}")


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of `x` the current one: Triton launches on that, not on that of its arguments."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def blocks(count: int, size: int) -> int:
    """How many blocks of a size cover so many."""
    return -(-count // size)


def power_of_two(count: int, least: int = 1) -> int:
    """The smallest power of two that is at least `count` and `least`."""
    return 1 << max(count - 1, least - 1, 0).bit_length()


def warps(elements: int) -> int:
    """Warps for a tile of so many elements: some 32 for each thread, from 1 to 16 warps."""
    return min(16, max(1, power_of_two(elements) // 1024))
