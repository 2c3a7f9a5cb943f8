import os

import pytest
import torch
from jaxtyping import config as jaxtyping_config

if not torch.cuda.is_available():
    # Before anything imports triton: its kernels then run in its interpreter, on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def no_shape_checks():
    """The shape hook breaks under torch.compile: tests that compile ask for this."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)
