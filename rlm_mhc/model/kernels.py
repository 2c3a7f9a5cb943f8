"""The kernels that mix the streams of a model of transformers: `from_pretrained(…, kernels="auto")`."""

import functools
import warnings
from typing import Any

import torch

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn import REFERENCE, Kernels
from rlm_mhc.kernels.launch import require_triton
from rlm_mhc.kernels.mixing import TRITON, refusal, settings_of


def kernels_for(name: str, shape: ModelConfig, device: torch.device, dtype: torch.dtype) -> Kernels:
    """Return the kernels of a name for a model on a device.

    `auto` takes the Triton kernels on CUDA where they serve the model and pass their self-test at its sizes, else the
    reference; a failed self-test is a warning.

    Args:
        name: `auto`, `reference` or `triton`.
        shape: the model's.
        device: where it runs.
        dtype: of its streams.

    Raises:
        ValueError: where the name is `triton` and they do not run this model on this device.

    >>> kernels_for("auto", ModelConfig.preset("tiny"), torch.device("cpu"), torch.float32) is REFERENCE
    True
    """
    if name == "reference" or not shape.mhc_enabled or (name == "auto" and device.type != "cuda"):
        return REFERENCE
    if name == "triton":
        settings_of(shape)
        require_triton(device)
        return TRITON
    sizes = (shape.mhc_flows, shape.hidden_dim, shape.mhc_sinkhorn_iters, shape.norm_eps)
    serves = refusal(shape) is None and _are_right(*sizes, shape.mhc_preset, device, dtype)
    return TRITON if serves else REFERENCE


@torch.compiler.assume_constant_result
def _are_right(*sizes: Any) -> bool:
    return _test_once(*sizes)


@functools.cache
def _test_once(
    flows: int, width: int, iterations: int, eps: float, preset: str, device: torch.device, dtype: torch.dtype
) -> bool:
    """Return whether the Triton kernels pass their self-test; warn where not."""
    from rlm_mhc.kernels.selftest import self_test_failure

    shape = ModelConfig(
        hidden_dim=width,
        num_heads=1,
        mhc_flows=flows,
        mhc_sinkhorn_iters=iterations,
        mhc_preset=preset,
        norm_eps=eps,
    )
    failure = self_test_failure(device, dtype, settings_of(shape), shape)
    if failure:
        warnings.warn(f"the Triton kernels fail their self-test, the reference mixes: {failure}", stacklevel=2)
    return failure is None
