"""A forward and a backward made of library ops as one differentiable function, for plain autograd and `torch.func`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

NO_SECOND = "fused kernels have no second derivatives and no forward mode; use the reference kernels"
MOST_INPUTS = 9


@dataclasses.dataclass(frozen=True)
class Halves:
    """`forward(settings, *inputs) -> (*outputs, *saved)`, where `outputs` of so many `inputs` have gradients;
    `backward(settings, inputs, outputs and saved, cotangents) -> cotangents of the inputs`."""

    name: str
    inputs: int
    outputs: int
    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]
    settings: Any = None


def joined(halves: Halves, settings: Any, inputs: tuple[Tensor, ...]) -> Any:
    """The outputs of `halves`, whose gradient is its backward's.

    Under `vmap` both run once for each element.

    Raises:
        RuntimeError: under second derivatives and in forward mode; use the reference kernels.
    """
    refuse_untraceable(halves.name)
    # Under torch.compile the backward of a Function is dropped where all its arguments are what is differentiated
    # (pytorch issue 193279); views of them are not.
    with_settings = dataclasses.replace(halves, settings=settings)
    absent = (None,) * (MOST_INPUTS - halves.inputs)
    return _Joined.apply(with_settings, *(x.view_as(x) for x in inputs), *absent)[: halves.outputs]


def refuse_untraceable(name: str) -> None:
    """Refuse what `torch.compile` traces through an `autograd.Function` as zero (torch 2.13).

    Raises:
        RuntimeError: when compiled within `torch.func.jvp`, or within two `torch.func.grad`.
    """
    if torch.compiler.is_compiling() and _in_jvp_or_two_gradients():
        raise RuntimeError(f"{NO_SECOND}: {name}")


@torch.compiler.assume_constant_result
def _in_jvp_or_two_gradients() -> bool:
    # Dynamo enters transforms while it traces, and guards on those that were entered before.
    levels = [level.key() for level in retrieve_all_functorch_interpreters()]
    return TransformType.Jvp in levels or levels.count(TransformType.Grad) > 1


class _Joined(torch.autograd.Function):
    # Without a gradient dynamo takes the first argument for a context where their number may vary.
    @staticmethod
    def forward(halves: Halves, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any, i: Any) -> Any:
        return halves.forward(halves.settings, *(a, b, c, d, e, f, g, h, i)[: halves.inputs])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.halves = inputs[0]
        ctx.mark_non_differentiable(*output[inputs[0].outputs :])
        ctx.save_for_backward(*inputs[1 : 1 + inputs[0].inputs], *output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        tensors = (*ctx.saved_tensors, *cotangents[: ctx.halves.outputs])
        # The number of arguments varies here too, which dynamo does not trace; it has refused a second derivative.
        run = _gradient if torch.compiler.is_compiling() else _Gradient.apply
        return None, *run(ctx.halves, *tensors), *(None,) * (MOST_INPUTS - ctx.halves.inputs)

    @staticmethod
    def vmap(info: Any, in_dims: Any, halves: Halves, *inputs: Any) -> Any:
        return _one_by_one(info, in_dims[1:], inputs, lambda own: _Joined.apply(halves, *own))


class _Gradient(torch.autograd.Function):
    """The gradient, with an error in place of a second derivative that would silently be zero."""

    @staticmethod
    def forward(halves: Halves, *tensors: Tensor) -> Any:
        return _gradient(halves, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.name = inputs[0].name

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise RuntimeError(f"{NO_SECOND}: {ctx.name}")

    @staticmethod
    def vmap(info: Any, in_dims: Any, halves: Halves, *tensors: Tensor) -> Any:
        return _one_by_one(info, in_dims[1:], tensors, lambda own: _Gradient.apply(halves, *own))


def _gradient(halves: Halves, *tensors: Tensor) -> Any:
    a, b = halves.inputs, len(tensors) - halves.outputs
    return halves.backward(halves.settings, tensors[:a], tensors[a:b], tensors[b:])


def _one_by_one(info: Any, in_dims: Any, tensors: tuple[Tensor, ...], run: Callable[[Any], Any]) -> Any:
    """The outputs of `run` for each element of the batch, stacked."""
    each = []
    for element in range(info.batch_size):
        pairs = zip(tensors, in_dims, strict=True)
        each.append(run([x if axis is None else x.select(axis, element) for x, axis in pairs]))
    outputs = tuple(torch.stack(parts) for parts in zip(*each, strict=True))
    return outputs, (0,) * len(outputs)
