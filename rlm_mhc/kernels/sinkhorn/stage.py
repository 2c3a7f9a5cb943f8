"""Sinkhorn as a stage, and as a differentiable function made of it."""

from typing import Any

from torch import Tensor

from rlm_mhc.fn.norm import widen
from rlm_mhc.kernels.sinkhorn.op import sinkhorn, sinkhorn_backward
from rlm_mhc.stage import Grads, Stage, Weights, as_function

Pulled = tuple[Grads, Tensor]  # named: the compiler does not trace a subscript in a signature


def sinkhorn_stage(num_iters: int, eps: float) -> Stage:
    """`logits [*b, n, n] -> res`, in fp32 or fp64; it keeps nothing."""

    def forward(weights: Weights, logits: Tensor) -> Any:
        return sinkhorn(logits, num_iters, eps), ()

    def backward(weights: Weights, logits: Tensor, residuals: Any, cotangent: Tensor) -> Pulled:
        return {}, sinkhorn_backward(logits, cotangent, num_iters, eps)

    return Stage(forward, backward)


def sinkhorn_knopp(logits: Tensor, *, num_iters: int = 20, eps: float = 0.0) -> Tensor:
    """`fn.sinkhorn_knopp`, faster on a CPU, and keeping only the logits for its backward.

    Raises:
        RuntimeError: under second derivatives and in forward mode (`jvp`); use the reference.

    >>> import torch
    >>> sinkhorn_knopp(torch.zeros(2, 2))
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    return as_function(sinkhorn_stage(num_iters, eps), "sinkhorn_knopp")({}, widen(logits))
