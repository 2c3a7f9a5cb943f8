"""The kernels that a run names."""

import time
import warnings

import torch

from rlm_mhc.config import ModelConfig, TrainConfig
from rlm_mhc.fn import REFERENCE, Kernels
from rlm_mhc.kernels.launch import require_triton
from rlm_mhc.kernels.mixing import MIXING, refusal
from rlm_mhc.kernels.proven import PROVEN
from rlm_mhc.program.precision import COMPUTE_DTYPE
from rlm_mhc.validation import in_short


def pick_kernels(model: ModelConfig, training: TrainConfig, device: torch.device) -> Kernels:
    """The reference, with the mixing that `training.kernels` and the attention that `training.attention` names.

    It prints in one line what mixes and why. `auto` takes the Triton kernels on a GPU whose kind a committed result
    shows to pass their tests, and there after a self-test of this model's sizes in this precision; where that fails,
    it warns and takes the reference.

    Raises:
        ValueError: when what is named is not installed or does not run this model on this device in this precision,
            or fails its self-test.
    """
    kernels = REFERENCE
    if model.mhc_enabled:
        mixed, why = _pick_mixing(model, training, device)
        print(f"mixing       {'Triton kernels' if mixed else 'reference'}: {why}", flush=True)
        kernels = kernels._replace(mixing=MIXING if mixed else None)
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


def _pick_mixing(model: ModelConfig, training: TrainConfig, device: torch.device) -> tuple[bool, str]:
    """Whether the Triton kernels mix, and why."""
    if training.kernels == "reference":
        return False, "training.kernels=reference"
    if training.kernels == "triton":
        MIXING.settings(model)
        require_triton(device)
        failure, took = _self_test(model, training, device)
        if failure:
            raise ValueError(f"the Triton kernels fail their self-test: {failure}; use training.kernels=reference")
        return True, f"training.kernels=triton; self-test passed in {took}"
    if device.type != "cuda":
        return False, f"the Triton kernels are for CUDA, and this is {device.type}"
    if reason := refusal(model):
        return False, f"the Triton kernels do not serve this model: {reason}"
    capability = torch.cuda.get_device_capability(device)
    if capability not in PROVEN:
        number = ".".join(map(str, capability))
        return False, (
            f"no committed result shows the Triton kernels passing their tests on compute capability {number} "
            "(python recipes/benchmark.py kernels makes one; training.kernels=triton takes them all the same)"
        )
    failure, took = _self_test(model, training, device)
    if failure:
        warnings.warn(f"the Triton kernels fail their self-test, the reference mixes: {failure}", stacklevel=2)
        return False, "the Triton kernels failed their self-test"
    return True, f"self-test passed in {took}; proven by {PROVEN[capability]}"


def _self_test(model: ModelConfig, training: TrainConfig, device: torch.device) -> tuple[str | None, str]:
    """What is wrong, or None, and how long it took, what it compiled apart; whatever is raised counts as wrong."""
    from rlm_mhc.kernels.selftest import self_test

    seconds = []
    try:
        require_triton(device)
        for _ in range(2):  # the first one compiles
            start = time.perf_counter()
            failure = self_test(device, COMPUTE_DTYPE[training.mixed_precision], MIXING.settings(model), model)
            seconds.append(time.perf_counter() - start)
            if failure:
                return failure, ""
    except Exception as error:
        return in_short(error), ""
    compiled, took = seconds[0] - seconds[1], seconds[1]
    return None, f"{1e3 * took:.0f} ms, compiled in {max(0.0, compiled):.1f} s"
