"""The ops of `mix_post` as one differentiable function."""

from typing import Any

from torch import Tensor

from rlm_mhc.kernels.joined import Halves, joined
from rlm_mhc.kernels.mix_post.op import mix_post as _mix_post
from rlm_mhc.kernels.mix_post.op import mix_post_backward


def _forward(settings: Any, *inputs: Tensor) -> Any:
    return (_mix_post(*inputs),)


def _backward(settings: Any, inputs: Any, outputs: Any, cotangents: Any) -> Any:
    return mix_post_backward(*inputs, *cotangents)


HALVES = Halves("mix_post", 4, 1, _forward, _backward)


def mix_post(streams: Tensor, output: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """`fn.mhc_combine`: `streams'[i] = Σ_j res[i, j] · streams[j] + post[i] · output`, by Triton kernels.

    Args:
        streams: `[*b, n, c]` in bf16, fp16 or fp32, n from 1 to 16, c a multiple of 16.
        output: `[*b, c]`, of the same dtype.
        post: `[*b, n]` in fp32.
        res: `[*b, n, n]` in fp32.

    Raises:
        ValueError: on another shape or dtype, and where the Triton kernels do not run.
    """
    return joined(HALVES, None, (streams, output, post, res))[0]
