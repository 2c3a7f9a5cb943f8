"""A forward and a backward made of library ops as one differentiable function, for plain autograd and `torch.func`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Options = tuple[Any, ...]
Forward = Callable[..., tuple[Tensor, ...]]
Backward = Callable[..., tuple[Tensor, ...]]


def joined(name: str, forward: Forward, backward: Backward) -> Callable[[Options, tuple[Tensor, ...]], Any]:
    """`call(options, inputs) -> outputs`, whose gradient is `backward`'s.

    `options` begin with the number of outputs. `forward(options, *inputs) -> (*outputs, *saved)`, all of which
    `backward(options, inputs, outputs and saved, cotangents) -> cotangents of the inputs` gets. Under `vmap` both run
    once for each element. Second derivatives are errors, and so is forward mode.
    """

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(options: Options, counts: tuple[int, int], *tensors: Tensor) -> Any:
            a, b = counts
            return backward(options, tensors[:a], tensors[a:b], tensors[b:])

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            raise RuntimeError(f"second derivatives of the fused {name} are not there; use the reference kernels")

        @staticmethod
        def vmap(info: Any, in_dims: Any, options: Options, counts: tuple[int, int], *tensors: Tensor) -> Any:
            return _one_by_one(info, in_dims[2:], tensors, lambda own: Gradient.apply(options, counts, *own))

    class Joined(torch.autograd.Function):
        @staticmethod
        def forward(options: Options, *inputs: Tensor) -> Any:
            return forward(options, *inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.options, *tensors = inputs
            ctx.count = len(tensors)
            ctx.mark_non_differentiable(*output[ctx.options[0] :])
            ctx.save_for_backward(*tensors, *output)

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            given = tuple(ctx.saved_tensors)
            wanted = cotangents[: ctx.options[0]]
            return None, *Gradient.apply(ctx.options, (ctx.count, len(given)), *given, *wanted)

        @staticmethod
        def vmap(info: Any, in_dims: Any, options: Options, *inputs: Tensor) -> Any:
            return _one_by_one(info, in_dims[1:], inputs, lambda own: Joined.apply(options, *own))

    def call(options: Options, inputs: tuple[Tensor, ...]) -> Any:
        # Under torch.compile the backward of a Function is dropped where all its arguments are what is
        # differentiated (pytorch issue 193279); views of them are not.
        return Joined.apply(options, *(x.view_as(x) for x in inputs))[: options[0]]

    return call


def _one_by_one(info: Any, in_dims: Any, tensors: tuple[Tensor, ...], run: Callable[[Any], Any]) -> Any:
    """The outputs of `run` for each element of the batch, stacked."""
    each = []
    for element in range(info.batch_size):
        pairs = zip(tensors, in_dims, strict=True)
        each.append(run([x if axis is None else x.select(axis, element) for x, axis in pairs]))
    outputs = tuple(torch.stack(parts) for parts in zip(*each, strict=True))
    return outputs, (0,) * len(outputs)
