"""What the interpreter does not see: that the kernels compile for a GPU, once for any number of tokens."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from rlm_mhc.kernels.launch import power_of_two, warps
from rlm_mhc.kernels.mix_pre import Settings
from rlm_mhc.kernels.mix_pre.tiling import apply_tile
from rlm_mhc.kernels.selftest import ARGUMENTS, draw_inputs, fused

TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
# In a process of its own: in this one the kernels are for the interpreter.
DESCRIBE = """
import json, triton
from rlm_mhc.kernels.mix_post import triton as a
from rlm_mhc.kernels.mix_pre import triton as b, triton_apply as c, triton_backward as d
kernels = [v for m in (a, b, c, d) for n, v in vars(m).items() if n.endswith("_kernel")]
print(json.dumps({k.fn.__name__: {p.name: [p.is_constexpr, p.do_not_specialize] for p in k.params} for k in kernels}))
"""
COMPILE = """
import json, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rlm_mhc.kernels.mix_post import triton as a
from rlm_mhc.kernels.mix_pre import triton as b, triton_apply as c, triton_backward as d
dtype, of_streams, jobs = json.loads(sys.argv[1])
for name, constants, warps, capability in jobs:
    kernel = next(vars(m)[name] for m in (a, b, c, d) if name in vars(m))
    pointers = {p: "*" + (dtype if p in of_streams else "fp32") for p in kernel.arg_names if p.endswith("_ptr")}
    known = {"tokens": "i32", "eps": "fp32"} | pointers | dict.fromkeys(constants, "constexpr")
    signature = {p: known[p] for p in kernel.arg_names}
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    print(name, capability, made.metadata.shared, flush=True)
"""
OF_STREAMS = (
    "x_ptr",
    "y_ptr",
    "u_ptr",
    "mixed_ptr",
    "g_ptr",
    "g_y_ptr",
    "g_u_ptr",
    "g_mixed_ptr",
    "out_ptr",
    "weight_ptr",
)
SHARED_BYTES = 99 * 1024  # of compute capability 8.6 and 8.9, the least from 8.0 on


def without_interpreter(code, *arguments):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@TRITON
def test_the_number_of_tokens_is_no_constant_of_any_kernel():
    kernels = json.loads(without_interpreter(DESCRIBE))
    assert sorted(kernels) == [
        "apply_kernel",
        "combine_kernel",
        "finish_kernel",
        "mapping_kernel",
        "norm_kernel",
        "project_kernel",
        "reduce_kernel",
    ]
    assert {name: parameters["tokens"] for name, parameters in kernels.items()} == {
        key: [False, True] for key in kernels
    }


def jobs(n, c, dtype, monkeypatch):
    """Each kernel as a launch on a GPU would compile it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    raw, width, p = 2 * n + n * n, power_of_two(c), power_of_two(n)
    shape = dict(C=c, N=n)
    project = dict(BT=32, BC=32, MP=power_of_two(raw, 16), G=n)
    sinkhorn = dict(P=p, ITERS=20, EPS=0.0)
    apply = dict(**apply_tile(n, raw, dtype), MORE="mix", PRECISION="ieee" if dtype == torch.float32 else "tf32")
    kernels = [
        ("combine_kernel", dict(BT=16, BC=128, TRANSPOSED=False, OUTPUT=True), 8),
        ("reduce_kernel", dict(R=16, BC=256, BT=power_of_two(16 // n)), 4),
        ("project_kernel", dict(M=raw, **project, COMBINE=True, GIVEN=True), 4),
        ("finish_kernel", dict(BT=1, BC=width, **sinkhorn, AGGREGATE=True, GIVEN=False), warps(2 * width)),
        ("norm_kernel", dict(BT=1, BC=width), 4),
        ("mapping_kernel", dict(BT=512 // (p * p), **sinkhorn, MORE=False), 4),
        ("apply_kernel", dict(M=raw, **apply), 8),
    ]
    return [(name, shape | constants, count) for name, constants, count in kernels]


@TRITON
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
@pytest.mark.parametrize(("dtype", "name", "capability"), [(torch.bfloat16, "bf16", 90), (torch.float32, "fp32", 80)])
def test_every_kernel_compiles_without_a_gpu_and_fits_its_shared_memory(dtype, name, capability, monkeypatch):
    wanted = [(*job, capability) for job in jobs(3, 96, dtype, monkeypatch)]
    lines = without_interpreter(COMPILE, json.dumps([name, OF_STREAMS, wanted])).splitlines()
    assert [line.split()[0] for line in lines] == [job[0] for job in wanted]
    assert max(int(line.split()[2]) for line in lines) <= SHARED_BYTES


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

    def run(tokens):
        outputs, pull = torch.func.vjp(
            fused(name, Settings(3, 1e-6, 0.0)), *draw_inputs(name, 4, 64, tokens, torch.bfloat16, "cuda").values()
        )
        pull(outputs)

    run(7)
    before = compiled()
    assert before > 0
    for tokens in (1, 2, 16, 63, 64, 1000, 4096):
        run(tokens)
    assert compiled() == before
