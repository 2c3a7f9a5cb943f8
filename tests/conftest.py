import importlib.metadata
import importlib.util
import os

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Processes that share the cores, before torch counts them; the programs that tests start inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import pytest
import torch

pytest_plugins = ["rlm_mhc.testing.fixtures"]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


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
