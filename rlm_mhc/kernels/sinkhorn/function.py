"""The two library ops as one differentiable function, for plain autograd and for `torch.func`."""

from typing import Any

import torch
from torch import Tensor

from rlm_mhc.fn.norm import widen
from rlm_mhc.kernels.joined import NO_SECOND, refuse_untraceable
from rlm_mhc.kernels.sinkhorn.op import sinkhorn, sinkhorn_backward


def sinkhorn_knopp(logits: Tensor, *, num_iters: int = 20, eps: float = 0.0) -> Tensor:
    """`fn.sinkhorn_knopp`, faster on a CPU, and keeping only the logits for its backward.

    Raises:
        RuntimeError: under second derivatives and in forward mode (`jvp`); use the reference.

    >>> sinkhorn_knopp(torch.zeros(2, 2))
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    refuse_untraceable("sinkhorn_knopp")
    wide = widen(logits)
    # Under torch.compile the backward of a Function is dropped where all its arguments are what is differentiated
    # (pytorch issue 193279); a view of them is not.
    return _Sinkhorn.apply(wide.view_as(wide), num_iters, eps)


class _Gradient(torch.autograd.Function):
    """The gradient, with an error in place of a second derivative that would silently be zero."""

    @staticmethod
    def forward(logits: Tensor, cotangent: Tensor, num_iters: int, eps: float) -> Tensor:
        return sinkhorn_backward(logits, cotangent, num_iters, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, None, None, None]:
        raise RuntimeError(f"{NO_SECOND}: sinkhorn_knopp")

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], logits: Tensor, cotangent: Tensor, num_iters: int, eps: float
    ) -> Any:
        logits, cotangent = (
            x.expand(info.batch_size, *x.shape) if axis is None else x.movedim(axis, 0)
            for x, axis in zip((logits, cotangent), in_dims, strict=False)
        )
        # Not the op: that has no backward, and a second derivative of a batch would be zero instead of an error.
        return _Gradient.apply(logits, cotangent, num_iters, eps), 0


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, num_iters: int, eps: float) -> Tensor:
        return sinkhorn(logits, num_iters, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, ctx.num_iters, ctx.eps = inputs
        ctx.save_for_backward(logits)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        return _Gradient.apply(logits, cotangents[0], ctx.num_iters, ctx.eps), None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], logits: Tensor, num_iters: int, eps: float
    ) -> tuple[Tensor, int]:
        return sinkhorn_knopp(logits.movedim(in_dims[0] or 0, 0), num_iters=num_iters, eps=eps), 0
