import importlib.metadata
import importlib.util
import os
import signal

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Processes that share the cores, before torch counts them; the programs that tests start inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

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
def default_signals():
    """Default handlers here and in the programs that a test starts: `nohup` and a shell's `&` ignore some signals."""
    plain, interrupt = signal.SIG_DFL, signal.default_int_handler
    defaults = {signal.SIGTERM: plain, signal.SIGHUP: plain, signal.SIGINT: interrupt}
    former = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield defaults
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.fixture
def no_shape_checks():
    """The shape hook breaks under torch.compile: tests that compile ask for this."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture
def tile_kernels():
    """The plain-torch references of the package; itself it needs a GPU compiler to be imported."""
    try:
        file = importlib.metadata.distribution("tile-kernels").locate_file("tile_kernels/torch/mhc.py")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("tile-kernels is not installed")
    spec = importlib.util.spec_from_file_location("tile_kernels_torch_mhc", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
