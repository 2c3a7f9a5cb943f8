"""Compile a function as one graph, without guards on the package's own code."""

import types
from typing import Any

import torch
from torch import Tensor

CONSTANTS = {"CONSTANT_MATCH", "EQUALS_MATCH"}


def compile_whole(f: Any, backend: str = "inductor") -> Any:
    """Return `f` compiled as one graph; other shapes, strides, dtypes, devices or aliasing of its arguments recompile.

    `f` may close over anything that stays the same. Arguments, PyTorch's global state and constants in modules are
    checked on every call; closures, functions, classes and modules are not.

    >>> run = compile_whole(lambda a, b: a - 2 * b, backend="eager")
    >>> a, b = torch.tensor(5.0), torch.tensor(7.0)
    >>> run(a, a), run(a, b)
    (tensor(-5.), tensor(-9.))
    """
    # Dynamo counts recompilations per code object: without one of its own, the ninth program of a process fails.
    own = types.FunctionType(f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    own.__kwdefaults__ = f.__kwdefaults__
    return torch.compile(own, backend=backend, fullgraph=True, dynamic=False, options={"guard_filter_fn": _needed})


def _needed(guards: Any) -> list[bool]:
    """Drop the guards on code, which take as long as a small layer: of a layer's backward 800 of 950.

    Guards without a name are on shapes and global state: grad mode, autocast, default dtype and device, transforms.
    Flags such as `torch.backends.cudnn.enabled` are constants in modules. A tensor in a closure is needed, because it
    may be an argument as well.
    """
    return [
        guard.name == ""
        or isinstance(guard.value, Tensor)
        or (guard.is_global and guard.guard_type in CONSTANTS)
        or _on_argument(guard.orig_guard)
        for guard in guards
    ]


def _on_argument(guard: Any) -> bool:
    # A guard on duplicate inputs has two sources: its own, and one bound in `create_fn`.
    sources = [guard.originating_source, *getattr(guard.create_fn, "keywords", {}).values()]
    return any(getattr(_root(source), "is_input", False) for source in sources)


def _root(source: Any) -> Any:
    while hasattr(source, "base"):
        source = source.base
    return source
