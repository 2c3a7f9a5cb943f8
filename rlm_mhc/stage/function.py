"""A stage as a differentiable function, for plain autograd, eager `torch.func` and `torch.compile`."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

from rlm_mhc.fn.transforms import in_forward_mode
from rlm_mhc.stage.core import Stage, Weights

NO_SECOND = "fused kernels have no second derivatives and no forward mode; use the reference kernels"
MOST_INPUTS = 9


@dataclasses.dataclass(frozen=True)
class _Call:
    """A stage and how its tensors are counted: weights and inputs in, outputs and residuals out."""

    stage: Stage
    name: str
    weights: tuple[str, ...]
    single: bool
    inputs: int
    outputs: int
    reads_outputs: bool

    def split(self, tensors: tuple[Tensor, ...]) -> tuple[Weights, Any]:
        """Return weights by name, and `x`."""
        count = len(self.weights)
        x = tensors[count : self.inputs]
        return dict(zip(self.weights, tensors[:count], strict=True)), x[0] if self.single else x


def as_function(
    stage: Stage, name: str, *, outputs: int = 1, reads_outputs: bool = False
) -> Callable[[Weights, Any], Any]:
    """Return `f(weights, x) -> y` with the gradient that the stage's backward computes.

    Under `vmap` a stage without weights gets the batch as a leading axis of every tensor; one with weights runs once
    for each element.

    Args:
        stage: with at most nine weights and inputs together; `x` a tensor or a tuple of them; the residuals a flat
            tuple of tensors; without weights it takes any leading axes.
        name: for errors.
        outputs: the number of tensors in `y`; a single one is no tuple.
        reads_outputs: whether the residuals begin with the outputs, which are then saved once.

    Raises:
        RuntimeError: under second derivatives and in forward mode.

    >>> cube = Stage(lambda w, x: (w["a"] * x**3, ()), lambda w, x, kept, g: ({"a": g * x**3}, 3 * w["a"] * x**2 * g))
    >>> torch.func.grad(lambda x: as_function(cube, "cube")({"a": torch.tensor(2.0)}, x))(torch.tensor(1.0))
    tensor(6.)
    """

    def function(weights: Weights, x: Any) -> Any:
        refuse_untraceable(name)
        single = isinstance(x, Tensor)
        tensors = (*weights.values(), *((x,) if single else x))
        call = _Call(stage, name, tuple(weights), single, len(tensors), outputs, reads_outputs)
        # Under torch.compile the backward of a Function is dropped where all its arguments are what is differentiated
        # (pytorch issue 193279); views of them are not.
        absent = (None,) * (MOST_INPUTS - len(tensors))
        found = _apply(_Function, call, *(t.view_as(t) for t in tensors), *absent)
        return found[0] if outputs == 1 else found[:outputs]

    return function


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


def _apply(function: type[torch.autograd.Function], call: _Call, *tensors: Any) -> Any:
    if torch.compiler.is_compiling() or not in_forward_mode():
        return function.apply(call, *tensors)
    try:
        return function.apply(call, *tensors)
    except RuntimeError as error:  # a `jvp` that raises would not be traced by the compiler
        if "jvp" not in str(error):
            raise
        raise RuntimeError(f"{NO_SECOND}: {call.name}") from error


class _Function(torch.autograd.Function):
    # Without a gradient dynamo takes the first argument for a context where their number may vary.
    @staticmethod
    def forward(call: _Call, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any, i: Any) -> Any:
        y, residuals = call.stage.forward(*call.split((a, b, c, d, e, f, g, h, i)))
        outputs = (y,) if call.outputs == 1 else tuple(y)
        return *outputs, *residuals[call.outputs if call.reads_outputs else 0 :]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        call = ctx.call = inputs[0]
        ctx.mark_non_differentiable(*output[call.outputs :])
        saved = output[0 if call.reads_outputs else call.outputs :]
        ctx.save_for_backward(*inputs[1 : 1 + call.inputs], *saved)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        tensors = (*ctx.saved_tensors, *cotangents[: ctx.call.outputs])
        # The number of arguments varies here too, which dynamo does not trace; it has refused a second derivative.
        run = _gradient if torch.compiler.is_compiling() else partial(_apply, _Gradient)
        return None, *run(ctx.call, *tensors), *(None,) * (MOST_INPUTS - ctx.call.inputs)

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: _Call, *inputs: Any) -> Any:
        count = call.inputs
        run = _one_by_one if call.weights else _at_once
        absent = inputs[count:]
        return run(info, in_dims[1 : 1 + count], inputs[:count], lambda own: _Function.apply(call, *own, *absent))


class _Gradient(torch.autograd.Function):
    """The gradient, with an error in place of a second derivative that would silently be zero."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> Any:
        return _gradient(call, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.name = inputs[0].name

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise RuntimeError(f"{NO_SECOND}: {ctx.name}")

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: _Call, *tensors: Tensor) -> Any:
        run = _one_by_one if call.weights else _at_once
        # Not the op: that has no backward, and a second derivative of a batch would be zero instead of an error.
        return run(info, in_dims[1:], tensors, lambda own: _Gradient.apply(call, *own))


def _gradient(call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
    end = len(tensors) - call.outputs
    cotangents = tensors[end] if call.outputs == 1 else tensors[end:]
    weights, x = call.split(tensors)
    grads, g_x = call.stage.backward(weights, x, tensors[call.inputs : end], cotangents)
    return *(grads[name] for name in call.weights), *((g_x,) if call.single else g_x)


def _at_once(info: Any, in_dims: Any, tensors: tuple[Tensor, ...], run: Callable[[Any], Any]) -> Any:
    """The outputs of `run` for the whole batch, as a leading axis."""
    pairs = zip(tensors, in_dims, strict=True)
    outputs = run([x.expand(info.batch_size, *x.shape) if axis is None else x.movedim(axis, 0) for x, axis in pairs])
    return outputs, (0,) * len(outputs)


def _one_by_one(info: Any, in_dims: Any, tensors: tuple[Tensor, ...], run: Callable[[Any], Any]) -> Any:
    """The outputs of `run` for each element of the batch, stacked."""
    each = []
    for element in range(info.batch_size):
        pairs = zip(tensors, in_dims, strict=True)
        each.append(run([x if axis is None else x.select(axis, element) for x, axis in pairs]))
    outputs = tuple(torch.stack(parts) for parts in zip(*each, strict=True))
    return outputs, (0,) * len(outputs)
