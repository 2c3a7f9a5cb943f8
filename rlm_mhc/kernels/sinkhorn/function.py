"""The two library ops as one differentiable function, for plain autograd and for `torch.func`."""

from typing import Any

import torch
from torch import Tensor

from rlm_mhc.fn.norm import widen
from rlm_mhc.kernels.sinkhorn.op import sinkhorn, sinkhorn_backward


def sinkhorn_knopp(logits: Tensor, *, num_iters: int = 20) -> Tensor:
    """`fn.sinkhorn_knopp`, faster on a CPU, and keeping only the logits for its backward.

    Not for forward mode (`jvp`): use the reference there.

    >>> sinkhorn_knopp(torch.zeros(2, 2))
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    if num_iters < 1:
        raise ValueError(f"num_iters={num_iters}: expected at least 1")
    wide = widen(logits)
    # Under torch.compile the backward of a Function is dropped where all its arguments are what is differentiated
    # (pytorch issue 193279); a view of them is not.
    return _Sinkhorn.apply(wide.view_as(wide), num_iters)


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, num_iters: int) -> Tensor:
        return sinkhorn(logits, num_iters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, ctx.num_iters = inputs
        ctx.save_for_backward(logits)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        return sinkhorn_backward(logits, cotangents[0], ctx.num_iters), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], logits: Tensor, num_iters: int) -> tuple[Tensor, int]:
        return sinkhorn_knopp(logits.movedim(in_dims[0] or 0, 0), num_iters=num_iters), 0
