"""How functions are compiled here."""

import types
from typing import Any

import torch

GUARDS = {
    "TENSOR_MATCH",
    "SHAPE_ENV",
    "GRAD_MODE",
    "GLOBAL_STATE",
    "DEFAULT_DEVICE",
    "DETERMINISTIC_ALGORITHMS",
    "TORCH_FUNCTION_STATE",
    "FUNCTORCH_STACK_MATCH",
    "AUTOGRAD_SAVED_TENSORS_HOOKS",
}


def compile_whole(f: Any) -> Any:
    """`f` compiled as one graph for each shape of its tensors.

    What `f` closes over must not change: of what is compiled, only tensors that are its arguments and PyTorch's own
    state are looked at again when it is called.
    """
    # Dynamo counts recompilations per code object: without one of its own, the ninth program of a process fails.
    own = types.FunctionType(f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False, options={"guard_filter_fn": _about_inputs})


def _about_inputs(guards: Any) -> list[bool]:
    """Of dynamo's guards those on inputs and on PyTorch's state; the others are on this package's own code and cost as
    much as a small layer."""
    return [guard.guard_type in GUARDS for guard in guards]
