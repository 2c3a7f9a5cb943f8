"""Pytest plugin with the fixtures that tests of several folders share.

In a `conftest.py`: `pytest_plugins = ["rlm_mhc.testing.fixtures"]`. Without a CUDA device Triton kernels run in
Triton's interpreter, on the CPU.
"""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import config as jaxtyping_config
from torch import Tensor

from rlm_mhc.testing.runs import write_corpus

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton


@pytest.fixture
def no_shape_checks() -> Iterator[None]:
    """Turn the checks of jaxtyping off, which break under torch.compile."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return the device that the Triton kernels run on: the CPU in the interpreter, or a GPU."""
    from rlm_mhc.kernels.launch import interpreted

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if (request.param == "cpu") != interpreted():
        pytest.skip("in Triton's interpreter, TRITON_INTERPRET=1, kernels run on the CPU, and without it on a GPU")
    return torch.device(request.param)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """Return the path of a small JSONL file of texts."""
    return str(write_corpus(tmp_path / "corpus.jsonl"))


@pytest.fixture
def default_signals() -> Iterator[dict[signal.Signals, Any]]:
    """Set the default handlers, here and in the programs that a test starts: `nohup` and a shell's `&` ignore some."""
    defaults: dict[signal.Signals, Any] = {
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
    }
    former = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield defaults
    for number, handler in former.items():
        signal.signal(number, handler)


def _plain(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def _functional(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.grad(f)(x)


def _compiled_plain(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return _plain(torch.compile(f, fullgraph=True), x)


def _compiled_functional(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.compile(lambda x: torch.func.grad(f)(x), fullgraph=True)(x)


MODES = {mode.__name__[1:]: mode for mode in (_plain, _functional, _compiled_plain, _compiled_functional)}


@pytest.fixture(params=MODES)
def gradient_of(request: pytest.FixtureRequest, no_shape_checks: None) -> Callable[..., Tensor]:
    """Return `gradient_of(f, x)`, the gradient of a scalar function: eager or compiled, by autograd or `torch.func`."""
    torch._dynamo.reset()
    return MODES[request.param]
