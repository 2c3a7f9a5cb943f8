"""A compiled function returns what the function returns, whatever changes between its calls."""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlm_mhc.program.compile import compile_whole


class Call(NamedTuple):
    """What the arguments of one call are made from."""

    size: int
    dtype: torch.dtype
    transposed: bool
    requires_grad: bool
    second: str
    more: int
    factor: float


CALLS = st.builds(
    Call,
    size=st.sampled_from([2, 3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    transposed=st.booleans(),
    requires_grad=st.booleans(),
    second=st.sampled_from(["same", "view", "other", "other dtype"]),
    more=st.integers(0, 2),
    factor=st.sampled_from([2, 3, 0.5]),
)


def arguments(call: Call) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, ...], float]:
    a = torch.arange(call.size**2, dtype=call.dtype).reshape(call.size, call.size) + 1
    a = (a.T if call.transposed else a).requires_grad_(call.requires_grad)
    other = a.detach().flip(0)
    b = {"same": a, "view": a.view(a.shape), "other": other, "other dtype": other.half()}[call.second]
    return a, {"b": b}, (a,) * (call.more // 2) + (b,) * (call.more % 2), call.factor


def f(a: Tensor, named: dict[str, Tensor], rest: tuple[Tensor, ...], factor: float) -> Any:
    return sum(rest, a - factor * named["b"]), a.stride(), a.requires_grad


@pytest.mark.usefixtures("no_shape_checks")
@settings(max_examples=20)
@given(st.lists(CALLS, min_size=2, max_size=4))
def test_compiled_calls_return_what_uncompiled_ones_do_in_any_order(calls):
    run = compile_whole(f, backend="aot_eager")
    for call in calls:
        actual, expected = run(*arguments(call)), f(*arguments(call))
        assert actual[0].dtype == expected[0].dtype
        assert actual[0].requires_grad == expected[0].requires_grad
        assert torch.equal(actual[0], expected[0])
        assert actual[1:] == expected[1:]
