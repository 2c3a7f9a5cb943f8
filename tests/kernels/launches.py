"""Compiles every launch of the mixing as a GPU would, without one: `python launches.py '[[n, c, dtype, capability]]'`.

To be run without Triton's interpreter. Prints a JSON object for each kernel that a forward and a backward launch there:
its name, the bytes of shared memory, and those of local memory, which is where registers are spilled to.
"""

import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rlm_mhc.kernels.mix_post import triton as mix_post
from rlm_mhc.kernels.mix_post_pre import triton as mix_post_pre
from rlm_mhc.kernels.mix_pre import triton as mix_pre
from rlm_mhc.kernels.mix_pre import triton_apply, triton_backward
from rlm_mhc.kernels.single_pass import triton as single_pass

MODULES = (mix_post, mix_pre, triton_apply, triton_backward)
KERNELS = {name: kernel for module in MODULES for name, kernel in vars(module).items() if name.endswith("_kernel")}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Recorder:
    """Stands for a kernel, and keeps what it is launched with."""

    def __init__(self, name, kept):
        self.name, self.kept = name, kept

    def __getitem__(self, grid):
        return lambda *args, **options: self.kept.append((self.name, args, options))


def launches(n, c, dtype, tokens=16384):
    """`(kernel, arguments, options)` of each launch, of forwards and backwards in all their forms."""
    kept = []
    for module in MODULES:
        for name in vars(module).keys() & KERNELS:
            setattr(module, name, Recorder(name, kept))
    with torch.device("meta"):
        x, y, weight = (torch.empty(*size, dtype=dtype) for size in ((tokens, n, c), (tokens, c), (c,)))
        raw = 2 * n + n * n
        phi, alpha, bias, h = (torch.empty(*size) for size in ((n * c, raw), (3,), (raw,), (tokens, raw)))
        per_token = torch.empty(tokens)
        post, res = torch.empty(tokens, n), torch.empty(tokens, n, n)
    rest = (phi, alpha, bias, weight, 20, 1e-6, 0.0)
    mix_post.combine(x, y, post, res)
    mix_post.reduce(x, y, post, x)
    mix_post.reduce(x, y, post, x, res)
    mix_pre.forward(x, *rest)
    mix_post_pre.forward(x, y, post, res, *rest)
    single_pass.pre(x, post, *rest)
    single_pass.post_pre(x, y, post, res, post, *rest)
    normed, _, _ = triton_backward.through_norm(x, post, weight, per_token, y)
    for more in (None, post):
        triton_backward.through_mappings(h, per_token, alpha, bias, (post, more, post, res), c, 20, 0.0)
    for more in ((None, None), (x, None), (x, res)):
        triton_apply.to_streams(x, post, phi, normed, h, per_token, *more)
    return kept


def source(name, args, options):
    """What Triton would compile for a launch, and the rest of its options."""
    kernel = KERNELS[name]
    named = {key: options.pop(key) for key in kernel.arg_names if key in options}
    values = dict(zip(kernel.arg_names, args, strict=False)) | named
    signature, constants, attributes = {}, {}, {}
    for number, key in enumerate(kernel.arg_names):
        if isinstance(values[key], torch.Tensor):
            signature[key] = "*" + NAMES[values[key].dtype]
            attributes[(number,)] = [["tt.divisibility", 16]]
        elif key in ("tokens", "eps"):
            signature[key] = {"tokens": "i32", "eps": "fp32"}[key]
        else:
            signature[key] = "constexpr"
            constants[key] = values[key]
    return ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)


def local_bytes(cubin):
    """Bytes of local memory that a thread of a compiled kernel has."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        said = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", said)))


def main():
    """Print what each launch takes."""
    warnings.simplefilter("ignore")
    done = set()
    for n, c, dtype, capability in json.loads(sys.argv[1]):
        for name, args, options in launches(n, c, DTYPES[dtype]):
            made = triton.compile(
                source(name, args, options), target=GPUTarget("cuda", capability, 32), options=options
            )
            if made.hash in done:
                continue
            done.add(made.hash)
            taken = {"shared": made.metadata.shared, "local": local_bytes(made.asm["cubin"])}
            sizes = {"n": n, "c": c, "dtype": dtype, "capability": capability}
            print(json.dumps({"kernel": name, **sizes, **taken}), flush=True)


if __name__ == "__main__":
    main()
