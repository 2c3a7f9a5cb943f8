"""The kernels that a run names."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from rlm_mhc.config import ModelConfig, TrainConfig
from rlm_mhc.fn import REFERENCE, Kernels
from rlm_mhc.kernels import choose
from rlm_mhc.kernels.launch import require_triton
from rlm_mhc.kernels.mixing import FUSED, refusal, settings_of
from rlm_mhc.program.precision import COMPUTE_DTYPE
from rlm_mhc.validation import in_short
from rlm_mhc.variants import PRESETS


def pick_kernels(
    model: ModelConfig,
    training: TrainConfig,
    device: torch.device,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
) -> Kernels:
    """The reference, with the mixing that `training.kernels` and the attention that `training.attention` names.

    It prints in one line what mixes and why. `auto` tests the Triton kernels on a GPU at this model's sizes in this
    precision, times them beside the compiled reference, and takes the faster; where the test fails, it warns and takes
    the reference.

    Args:
        model: the config.
        training: the config.
        device: where it runs.
        gather: returns the values of all ranks, so that all of them take the same.

    Raises:
        ValueError: when what is named is not installed or does not run this model on this device in this precision,
            or fails its self-test.
    """
    kernels = REFERENCE
    if model.mhc_enabled:
        mixed, why = _pick_mixing(model, training, device, gather)
        print(f"mixing       {'Triton kernels' if mixed else 'reference'}: {why}", flush=True)
        kernels = kernels._replace(block=FUSED if mixed else None)
    elif training.kernels == "triton":
        raise ValueError("training.kernels='triton' mixes the streams of mHC, and the model has none; leave it out")
    if training.attention == "torch":
        return kernels
    if device.type != "cuda" or training.mixed_precision == "fp32":
        raise ValueError(
            "training.attention='flash_attn' runs on CUDA in bf16 or fp16 only; use training.attention=torch"
        )
    from rlm_mhc.kernels.flash_attention import flash_attention, require_flash_attention

    require_flash_attention(model.head_width)
    return kernels._replace(attention=flash_attention)


def _pick_mixing(
    model: ModelConfig, training: TrainConfig, device: torch.device, gather: Callable[[Any], list[Any]]
) -> tuple[bool, str]:
    """Return whether the Triton kernels mix, and why."""
    if training.kernels == "reference":
        return False, "training.kernels=reference"
    if training.kernels == "triton":
        settings_of(model)
        require_triton(device)
        failure, took = _self_test(model, training, device)
        if failure:
            raise ValueError(f"the Triton kernels fail their self-test: {failure}; use training.kernels=reference")
        return True, f"training.kernels=triton; self-test passed in {took}"
    if device.type != "cuda":
        return False, f"the Triton kernels are for CUDA, and this is {device.type}"
    if reason := refusal(model):
        return False, f"the Triton kernels do not serve this model: {reason}"
    failure, took = _self_test(model, training, device)
    times, untimed = (None, "") if failure else _times(model, training, device)
    failures, of_ranks, reasons = zip(*gather((failure, times, untimed)), strict=True)
    failure, times = next(filter(None, failures), None), of_ranks[0]
    if failure:
        warnings.warn(f"the Triton kernels fail their self-test, the reference mixes: {failure}", stacklevel=2)
        return False, "the Triton kernels failed their self-test"
    if times is None:
        warnings.warn(f"the Triton kernels could not be timed, the reference mixes: {reasons[0]}", stacklevel=2)
        return False, "the Triton kernels could not be timed"
    faster = times.reference / times.fused
    measured = f"{times.fused:.2f} ms a sub-layer, the compiled reference {times.reference:.2f} ms ({faster:.2f}×)"
    return faster > 1, f"the Triton kernels take {measured}; self-test passed in {took}"


def _times(model: ModelConfig, training: TrainConfig, device: torch.device) -> tuple[choose.Times | None, str]:
    """Return the times of a sub-layer, or None and what was raised."""
    early, dtype = PRESETS[model.mhc_preset].early_pre, COMPUTE_DTYPE[training.mixed_precision]
    try:
        return choose.mixing_times(model.mhc_flows, model.hidden_dim, early, settings_of(model), dtype, device), ""
    except Exception as error:
        return None, in_short(error)


def _self_test(model: ModelConfig, training: TrainConfig, device: torch.device) -> tuple[str | None, str]:
    """What is wrong, or None, and how long it took, what it compiled apart; whatever is raised counts as wrong."""
    from rlm_mhc.kernels.selftest import self_test_failure

    seconds = []
    for _ in range(2):  # the first one compiles
        start = time.perf_counter()
        failure = self_test_failure(device, COMPUTE_DTYPE[training.mixed_precision], settings_of(model), model)
        seconds.append(time.perf_counter() - start)
        if failure:
            return failure, ""
    compiled, took = seconds[0] - seconds[1], seconds[1]
    return None, f"{1e3 * took:.0f} ms, compiled in {max(0.0, compiled):.1f} s"
