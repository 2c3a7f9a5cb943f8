"""Time the fused mixing beside the compiled reference at a model's sizes, once per machine."""

import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from rlm_mhc.disk import replace_file
from rlm_mhc.kernels.mix_pre import Settings
from rlm_mhc.kernels.native import cache_folder
from rlm_mhc.kernels.selftest import draw_inputs, fused, reference

TOKENS = 8192  # enough for a GPU to be busy
SECONDS, TURNS = 0.2, 2  # of each in turn
PACKAGES = ("torch", "triton", "rlm-mhc")


class Times(NamedTuple):
    """Milliseconds of the forward and backward of one sub-layer's mixing."""

    fused: float
    reference: float


def mixing_times(
    streams: int, width: int, early_pre: bool, settings: Settings, dtype: torch.dtype, device: torch.device
) -> Times:
    """Time the mixing of one sub-layer, fused and as the compiled reference, in under two seconds besides compiling.

    The result is cached by device, versions of PyTorch, Triton and this package, and sizes.

    Args:
        streams: n.
        width: c.
        early_pre: whether the aggregate is by the `pre` of the sub-layer before.
        settings: of the mixing.
        dtype: of the streams.
        device: a CUDA device, or in Triton's interpreter the CPU.

    Raises:
        Exception: whatever compiling or running one of them raises.
    """
    name = "single_pass_sub_layer" if early_pre else "sub_layer"
    sizes = {"name": name, "n": streams, "c": width, "dtype": str(dtype), **settings._asdict()}
    file = _cache_file(sizes, device)
    with suppress(OSError, ValueError, TypeError):
        return Times(**json.loads(file.read_text(encoding="utf-8")))
    times = _measure(name, draw_inputs(name, streams, width, TOKENS, dtype, device), settings)
    with suppress(OSError):  # then it is measured again
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_file(file, lambda path: path.write_text(json.dumps(times._asdict()), encoding="utf-8"), durable=False)
    return times


def _cache_file(sizes: dict[str, Any], device: torch.device) -> Path:
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    key = json.dumps({"device": kind, **versions, **sizes}, sort_keys=True)
    return cache_folder() / f"mixing-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _measure(name: str, inputs: dict[str, Tensor], settings: Settings) -> Times:
    values = tuple(inputs.values())
    calls = [_with_gradients(make(name, settings), values) for make in (fused, reference)]
    best = [float("inf")] * len(calls)
    for _ in range(TURNS):
        for index, call in enumerate(calls):
            timer = Timer("call()", globals={"call": call})
            best[index] = min(best[index], 1e3 * timer.blocked_autorange(min_run_time=SECONDS).median)
    return Times(*best)


def _with_gradients(run: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """Forward and backward, compiled as one function."""
    cotangents = tuple(torch.randn_like(y) for y in run(*inputs))

    def forward_and_backward(inputs: Any, cotangents: Any) -> Any:
        outputs, vjp = torch.func.vjp(run, *inputs)  # type: ignore[misc]
        return outputs, vjp(cotangents)

    compiled = torch.compile(forward_and_backward, fullgraph=True)
    compiled(inputs, cotangents)
    return lambda: compiled(inputs, cotangents)
