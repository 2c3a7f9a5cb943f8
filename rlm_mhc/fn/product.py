"""Matrix products that are computed in the dtype of their factors, whatever `torch.autocast` is around them.

A context without autocast reaches a forward only: the products of its backward run under the autocast of whoever calls
that backward. Here they are autograd Functions where autocast is on, and torch's own operations where it is off.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

from rlm_mhc.fn.transforms import in_forward_mode


def without_autocast(kind: str) -> contextlib.AbstractContextManager[Any]:
    """A context in which autocast is off for a type of device; it does nothing where autocast is off already."""
    return torch.autocast(kind, enabled=False) if _autocast_on(kind) else contextlib.nullcontext()


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` computed with autocast off, derivatives of any order included.

    Args:
        a: `[*b, m, k]` or `[k]`.
        b: `[k, n]`, or `[*b, k, n]` with the batch axes of `a`.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     product(torch.full((1, 1), 1.001), torch.ones(1, 1))
    tensor([[1.0010]])
    """
    if not _autocast_on(a.device.type):
        return a @ b
    if a.dim() == 1:
        return product(a.unsqueeze(0), b).squeeze(-2)
    if in_forward_mode():
        # The compiler takes no Function with a `jvp`, and torch's own nested is zero; autocast does not touch fp64.
        return (a.double() @ b.double()).to(b.dtype)
    with without_autocast(a.device.type):
        # Views: see `pullback` in rlm_mhc.stage.
        return _Product.apply(a.view_as(a), b.view_as(b))


def add_product(base: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`base + scale · a @ b` of matrices, and its derivatives, as without autocast.

    >>> add_product(torch.ones(1, 1), torch.ones(1, 2), torch.ones(2, 1), 0.5)
    tensor([[2.]])
    """
    if not _autocast_on(a.device.type):
        return torch.addmm(base, a, b, alpha=scale)
    return base + scale * product(a, b)


def _autocast_on(kind: str) -> bool:
    # `torch.amp.is_autocast_available` would say this of "meta" too, but the compiler of PyTorch 2.11 cannot trace it.
    return kind != "meta" and torch.is_autocast_enabled(kind)


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, Tensor]:
        (g,), (a, b) = cotangents, ctx.saved_tensors
        left, right = (a.flatten(0, -2), g.flatten(0, -2)) if b.dim() == 2 else (a, g)
        if torch.compiler.is_compiling():  # traced without autocast, this runs with that of its caller
            with torch.autocast(a.device.type, enabled=False):
                return g @ b.mT, left.mT @ right
        return product(g, b.mT), product(left.mT, right)
