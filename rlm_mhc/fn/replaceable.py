"""The one place where a function may stand in for weights: an adapter, a quantised layer, a hooked module."""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeGuard, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
W = TypeVar("W")


def replaceable(
    takes: int,
) -> Callable[[Callable[Concatenate[W, P], R]], Callable[Concatenate[W | Callable[..., Any], P], R]]:
    """Make `f(params, *args)` call `params(*args)` instead, with the first `takes` arguments, if `params` is callable.

    >>> @replaceable(1)
    ... def scale(params, x, offset=1):
    ...     return params * x + offset
    >>> scale(2, 3), scale(lambda x: -x, 3)
    (7, -3)
    """

    def decorate(f: Callable[Concatenate[W, P], R]) -> Callable[Concatenate[W | Callable[..., Any], P], R]:
        @functools.wraps(f)
        def apply(params: Any, *args: P.args, **options: P.kwargs) -> Any:
            return params(*args[:takes]) if callable(params) else f(params, *args, **options)

        return apply

    return decorate


def is_present(weights: W | tuple[()]) -> TypeGuard[W]:
    """Return whether a group of weights is not `()`; it may be a function. The compiler of PyTorch 2.11 has no `bool`
    of a module.

    >>> is_present(()), is_present(abs)
    (False, True)
    """
    return not isinstance(weights, tuple) or len(weights) > 0
