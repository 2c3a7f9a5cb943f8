"""Stages: pairs of pure functions, forward and backward, and the ways to combine them.

A stage sees the weights of a layer under their dotted names and an input of any tree. Its forward also returns what
its backward needs besides that input; what the backward cannot do without is thereby explicit, and a compiler that
gets the backward as one function drops whatever of a recomputed forward is not used.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Weights = Mapping[str, Tensor]
Grads = dict[str, Tensor]
_BROUGHT: dict[Any, Any] = {}


class Stage(NamedTuple):
    """`forward(weights, x) -> (y, kept)` and `backward(weights, x, kept, cotangent of y) -> (grads, cotangent of x)`.

    `grads` holds a gradient for each weight that the stage uses. `kept` never contains `x` itself.
    `replay(x, kept) -> y`, where a stage has it, gives the output again without weights or products.
    """

    forward: Callable[[Weights, Any], tuple[Any, Any]]
    backward: Callable[[Weights, Any, Any, Any], tuple[Grads, Any]]
    replay: Callable[[Any, Any], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Staged:
    """A function that brings its stage: called, it is `function(*inputs)`; the program runs `stage`.

    >>> double = Staged(lambda x: 2 * x, stage(lambda x: 2 * x))
    >>> double(3), stage_of(double) is double.stage
    (6, True)
    """

    function: Callable[..., Any]
    stage: Any

    def __call__(self, *inputs: Any) -> Any:
        """`function(*inputs)`."""
        return self.function(*inputs)


def bring_stage(function: Callable[..., Any], brought: Any) -> None:
    """Have `stage_of(function)` return `brought`: a stage, or a function that builds one."""
    _BROUGHT[function] = brought


def stage_of(function: Callable[..., Any], overridden: Collection[str] = ()) -> Any:
    """Return what a function brings: its stage, or a function that builds one; None if it brings nothing.

    A `partial` brings what its function does, if all that it binds are keywords that the caller passes anyway.

    >>> stage_of(abs) is None
    True
    """
    while isinstance(function, functools.partial):
        if function.args or set(function.keywords) - set(overridden):
            return None
        function = function.func
    return function.stage if isinstance(function, Staged) else _BROUGHT.get(function)


def pullback(f: Callable[..., Any], *inputs: Any) -> tuple[Any, Callable[[Any], Any]]:
    """`f(*inputs)`, and the function from its cotangent to those of the inputs: `torch.func.vjp`.

    >>> y, pull = pullback(lambda x: x**2, torch.tensor(3.0))
    >>> y, pull(torch.tensor(1.0))
    (tensor(9.), (tensor(6.),))
    """

    def viewed(*inputs: Any) -> Any:
        # Under torch.compile an autograd.Function in `f` loses its own backward where its arguments are exactly what
        # is differentiated (pytorch issue 193279); views of them are not.
        return f(*pytree.tree_map(lambda x: x.view_as(x) if isinstance(x, Tensor) else x, inputs))

    output, pull = torch.func.vjp(viewed, *inputs)  # type: ignore[misc]
    return output, pull


def stage(f: Callable[..., Any], *names: str, constants: tuple[str, ...] = ()) -> Stage:
    """The stage of `f(*weights, *constants, x)`, its backward derived by `torch.func.vjp`; it keeps nothing.

    Compiled, the backward recomputes of `f` only what its derivative reads: a product that `f` ends in is not.

    >>> square = stage(lambda w, x: w * x**2, "w")
    >>> square.backward({"w": torch.tensor(3.0)}, torch.tensor(2.0), (), torch.tensor(1.0))
    ({'w': tensor(4.)}, tensor(12.))
    """

    def forward(weights: Weights, x: Any) -> tuple[Any, Any]:
        return f(*(weights[name] for name in names + constants), x), ()

    def backward(weights: Weights, x: Any, kept: Any, cotangent: Any) -> tuple[Grads, Any]:
        fixed = tuple(weights[name] for name in constants)
        own = tuple(weights[name] for name in names)
        _, pull = pullback(lambda own, x: f(*own, *fixed, x), own, x)
        grads, x_cotangent = pull(cotangent)
        return dict(zip(names, grads, strict=True)), x_cotangent

    return Stage(forward, backward)


def chain(*stages: Stage) -> Stage:
    """One stage after another. The residuals are the inner inputs, and those of the stages.

    >>> double, square = stage(lambda x: 2 * x), stage(lambda x: x**2)
    >>> both = chain(double, square)
    >>> y, residuals = both.forward({}, torch.tensor(3.0))
    >>> y, both.backward({}, torch.tensor(3.0), residuals, torch.tensor(1.0))
    (tensor(36.), ({}, tensor(24.)))
    """

    def forward(weights: Weights, x: Any) -> tuple[Any, Any]:
        inputs, inner = [], []
        for s in stages:
            inputs.append(x)
            x, own = s.forward(weights, x)
            inner.append(own)
        return x, (tuple(inputs[1:]), tuple(inner))

    def backward(weights: Weights, x: Any, residuals: Any, cotangent: Any) -> tuple[Grads, Any]:
        inputs, inner = residuals
        grads: Grads = {}
        for s, x_in, own in reversed(list(zip(stages, (x, *inputs), inner, strict=True))):
            found, cotangent = s.backward(weights, x_in, own, cotangent)
            grads |= found
        return grads, cotangent

    return Stage(forward, backward)


def residual(branch: Stage) -> Stage:
    """`x + branch(x)`."""

    def forward(weights: Weights, x: Tensor) -> tuple[Tensor, Any]:
        y, kept = branch.forward(weights, x)
        return x + y, kept

    def backward(weights: Weights, x: Tensor, kept: Any, cotangent: Tensor) -> tuple[Grads, Tensor]:
        grads, x_cotangent = branch.backward(weights, x, kept, cotangent)
        return grads, cotangent + x_cotangent

    return Stage(forward, backward)


def recompute(s: Stage) -> Stage:
    """The same stage keeping nothing: its backward runs the forward again."""

    def backward(weights: Weights, x: Any, kept: Any, cotangent: Any) -> tuple[Grads, Any]:
        return s.backward(weights, x, s.forward(weights, x)[1], cotangent)

    return Stage(lambda weights, x: (s.forward(weights, x)[0], ()), backward)
