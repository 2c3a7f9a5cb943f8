"""A compiled function returns what the function returns, whatever changes between its calls."""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlm_mhc.program.compile import compile_whole


class Call(NamedTuple):
    """What the arguments of one call are made from; hypothesis tries the first field and value first."""

    second: Any
    first: Any
    more: Any
    factor: Any


VALUES = Call(
    second=["same", "other", "view", "other dtype"],
    first=["plain", "larger", "float64", "transposed", "requires grad", "meta"],
    more=[0, 1, 2, 3],
    factor=[2, 3, 0.5],
)


@st.composite
def successive_calls(draw: Any) -> list[Call]:
    """Three calls, each of which differs from the one before in one respect."""
    calls = [Call(*(draw(st.sampled_from(values)) for values in VALUES))]
    for field in draw(st.lists(st.sampled_from(Call._fields), min_size=2, max_size=2)):
        others = [value for value in getattr(VALUES, field) if value != getattr(calls[-1], field)]
        calls.append(calls[-1]._replace(**{field: draw(st.sampled_from(others))}))
    return calls


def arguments(call: Call) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, ...], float]:
    size, dtype = 3 if call.first == "larger" else 2, torch.float64 if call.first == "float64" else torch.float32
    a = torch.arange(size**2, dtype=dtype, device="meta" if call.first == "meta" else "cpu").reshape(size, size) + 1
    a = (a.T if call.first == "transposed" else a).requires_grad_(call.first == "requires grad")
    other = a.detach().flip(0)
    b = {"same": a, "view": a.view(a.shape), "other": other, "other dtype": other.half()}[call.second]
    return a, {"b": b}, (a,) * (call.more // 2) + (b,) * (call.more % 2), call.factor


def f(a: Tensor, named: dict[str, Tensor], rest: tuple[Tensor, ...], factor: float) -> Any:
    return sum(rest, a - factor * named["b"]), a.stride(), a.requires_grad


@pytest.mark.usefixtures("no_shape_checks")
@settings(max_examples=10, phases=[Phase.generate])
@given(successive_calls())
def test_compiled_calls_return_what_uncompiled_ones_do_in_any_order(calls):
    run = compile_whole(f, backend="aot_eager")
    for call in calls:
        actual, expected = run(*arguments(call)), f(*arguments(call))
        for name in ("dtype", "device", "shape", "requires_grad"):
            assert getattr(actual[0], name) == getattr(expected[0], name)
        assert expected[0].is_meta or torch.equal(actual[0], expected[0])
        assert actual[1:] == expected[1:]
