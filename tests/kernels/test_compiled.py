"""What the interpreter does not see: that the launches compile for a GPU as they are, once for any number of tokens."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlm_mhc.kernels.mix_pre import Settings
from rlm_mhc.kernels.selftest import ARGUMENTS, WEIGHTS, draw_inputs, fused

TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
# In a process of its own: in this one the kernels are for the interpreter.
DESCRIBE = """
import json, triton
from rlm_mhc.kernels.mix_post import triton as a
from rlm_mhc.kernels.mix_pre import triton as b, triton_apply as c, triton_backward as d
kernels = [v for m in (a, b, c, d) for n, v in vars(m).items() if n.endswith("_kernel")]
print(json.dumps({k.fn.__name__: {p.name: [p.is_constexpr, p.do_not_specialize] for p in k.params} for k in kernels}))
"""
LAUNCHES = Path(__file__).with_name("launches.py")
KERNELS = {
    "apply_kernel",
    "combine_kernel",
    "finish_kernel",
    "mapping_kernel",
    "norm_kernel",
    "project_kernel",
    "reduce_kernel",
}
# Bytes of registers that a program may spill, by kernel and streams. On an H200 `apply_kernel` is a fifth faster with
# `phi` held and a few numbers spilled than without either.
SPILLED = {("apply_kernel", 4): 96}
SHARED_BYTES = 99 * 1024  # of compute capability 8.6 and 8.9, the least from 8.0 on


def without_interpreter(code, *arguments):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@TRITON
def test_the_number_of_tokens_is_no_constant_of_any_kernel():
    kernels = json.loads(without_interpreter(DESCRIBE))
    assert kernels.keys() == KERNELS
    assert {name: parameters["tokens"] for name, parameters in kernels.items()} == {
        key: [False, True] for key in kernels
    }


@TRITON
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
@pytest.mark.parametrize(
    ("n", "c", "dtype", "capability"), [(4, 2048, "bf16", 90), (8, 2048, "bf16", 90), (3, 96, "fp32", 80)]
)
def test_every_launch_compiles_without_a_gpu_and_fits_its_shared_memory_and_registers(n, c, dtype, capability):
    sizes = [(n, c, dtype, capability)]
    found = [json.loads(line) for line in without_interpreter(LAUNCHES.read_text(), json.dumps(sizes)).splitlines()]
    assert {launch["kernel"] for launch in found} == KERNELS
    for launch in found:
        assert launch["shared"] <= SHARED_BYTES, launch
        assert launch["local"] <= SPILLED.get((launch["kernel"], n), 0), f"registers are spilled: {launch}"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ARGUMENTS)
def test_gpu_another_number_of_tokens_compiles_nothing(name):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from rlm_mhc.kernels.mix_post import triton as a
    from rlm_mhc.kernels.mix_pre import triton as b
    from rlm_mhc.kernels.mix_pre import triton_apply as c
    from rlm_mhc.kernels.mix_pre import triton_backward as d

    kernels = [v for m in (a, b, c, d) for key, v in vars(m).items() if key.endswith("_kernel")]

    def compiled():
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    def run(tokens, first=0):
        drawn = draw_inputs(name, 3, 64, first + tokens, torch.bfloat16, "cuda")
        inputs = (x if key in WEIGHTS else x[first:] for key, x in drawn.items())
        outputs, pull = torch.func.vjp(fused(name, Settings(3, 1e-6, 0.0)), *inputs)
        pull(outputs)

    run(7)
    before = compiled()
    assert before > 0
    for tokens in (1, 2, 16, 63, 64, 1000, 4096):
        run(tokens)
    run(7, first=1)  # which begins off 16 bytes
    assert compiled() == before
