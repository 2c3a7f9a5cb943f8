import pytest
import torch

from rlm_mhc.kernels.launch import interpreted


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where the Triton kernels run: in the interpreter on a CPU, or compiled on a GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if (request.param == "cpu") != interpreted():
        pytest.skip("in Triton's interpreter, TRITON_INTERPRET=1, kernels run on the CPU, and without it on a GPU")
    return torch.device(request.param)
