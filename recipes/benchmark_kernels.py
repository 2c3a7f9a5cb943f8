"""The fused mixing beside the compiled reference and others: `python recipes/benchmark.py kernels [key=value …]`.

First the tests of the kernels on the GPU, then times. Prints a table and writes all of it as JSON. A run of some sizes
adds to what the file has of the same code on the same device. Run it on an otherwise idle GPU: times are of work on the
device, medians of interleaved rounds, and shares are of the copy bandwidth measured in the same run.
"""

import dataclasses
import functools
import itertools
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor

from rlm_mhc.kernels.launch import interpreted, require_triton
from rlm_mhc.kernels.mix_pre import Settings
from rlm_mhc.kernels.selftest import ARGUMENTS, COMBINE, GIVEN, draw, fused, reference
from rlm_mhc.parallel import code_version
from rlm_mhc.testing.kernel_baselines import PEER_OPS, PEERS, Implementation, Op, as_op
from rlm_mhc.testing.kernel_results import BEYOND_CACHES, merged, size_of, table
from rlm_mhc.testing.measure import busy, copy_bandwidth, provenance, write_result
from rlm_mhc.train import command, pick_device
from rlm_mhc.validation import at_least, check, in_short, location, one_of, some_of

ROOT = Path(__file__).parents[1]
DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SMOKE = ((32,), (2,), (5,))
TOKENS_TO_COMPARE = 512
CALLS = 10  # of one timing
PER_TOKEN = ("streams", *COMBINE, *GIVEN)
TESTS = ("tests/kernels", "tests/program/test_mixing.py")
OURS, COMPILED = "ours", "compiled reference"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """What to measure."""

    ops: tuple[str, ...] = some_of(*ARGUMENTS)
    widths: tuple[int, ...] = some_of(768, 2048, 4096)
    streams: tuple[int, ...] = some_of(2, 4, 8)
    tokens: tuple[int, ...] = some_of(4096, 16384, 32768)
    dtype: str = one_of("bf16", "fp16", "fp32")
    iterations: int = at_least(1, 20)
    rounds: int = at_least(1, 15)
    tests: bool = True
    smoke: bool = False
    device: str = one_of("auto", "cpu", "cuda")
    output_dir: str = location("recipes/results")
    debug: bool = False

    def __post_init__(self) -> None:
        check(self)


def bytes_to_move(name: str, n: int, c: int, tokens: int, itemsize: int) -> tuple[int, int]:
    """What forward and backward must read and write at least, all weights once; see the ops' READMEs.

    Those of a whole sub-layer count apart what is apart in a model, where the sub-layer itself runs in between.
    """
    streams, numbers = c * itemsize * tokens, 4 * tokens
    given = n * numbers * name.startswith("single_pass")
    of_combine, of_mappings, phi = (n + n * n) * numbers, (2 * n + n * n) * numbers, 4 * n * c * (2 * n + n * n)
    post = (2 * n + 1) * streams + of_combine, (3 * n + 2) * streams + 2 * of_combine
    pre = (n + 1) * streams + of_mappings + phi + given, (2 * n + 1) * streams + 2 * (of_mappings + phi + given)
    if name == "mix_post":
        return post
    if name.endswith("sub_layer"):
        return post[0] + pre[0], post[1] + pre[1]
    if name.endswith("post_pre"):  # the combined streams and their cotangent stay on chip
        return post[0] + pre[0] - n * streams, post[1] + pre[1] - 2 * n * streams
    return pre


def halves(
    op: Implementation, inputs: dict[str, Tensor], calls: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    """A forward that keeps what the backward needs, and the backward alone.

    The calls of one timing take turns with copies of the inputs, so many that they find none of them in a cache.
    """
    copies = min(calls, 1 + BEYOND_CACHES // sum(x.numel() * x.itemsize for x in inputs.values()))
    leaves = [[x.detach().clone().requires_grad_() for x in op.arrange(*inputs.values())] for _ in range(copies)]
    outputs = [op.run(*own) for own in leaves]
    cotangents = [[torch.randn_like(x) for x in own] for own in outputs]
    forwards, backwards = itertools.cycle(leaves), itertools.cycle(zip(outputs, leaves, cotangents, strict=True))
    return lambda: op.run(*next(forwards)), lambda: torch.autograd.grad(*next(backwards), retain_graph=True)


def error(op: Implementation, exact: Op, inputs: dict[str, Tensor]) -> float:
    """The largest error of any output or gradient against float64, relative to its largest entry."""

    def everything(run: Op, values: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in values]
        outputs = run(*leaves)
        generator = torch.Generator().manual_seed(1)
        cotangents = [
            torch.randn(x.shape, generator=generator, dtype=torch.float32, device="cpu").to(x) for x in outputs
        ]
        return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]

    ours = everything(lambda *leaves: op.run(*op.arrange(*leaves)), [*inputs.values()])
    theirs = everything(exact, [x.double() for x in inputs.values()])
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


def compiled(name: str, settings: Settings) -> Op:
    """The reference compiled for one width and number of streams and any number of tokens."""
    torch.compiler.reset()  # another width or number of streams is another compilation
    run = torch.compile(reference(name, settings), fullgraph=True)

    def with_any_tokens(*inputs: Tensor) -> tuple[Tensor, ...]:
        for key, x in zip(ARGUMENTS[name], inputs, strict=True):
            if key in PER_TOKEN:
                torch._dynamo.mark_dynamic(x, 0)
        return run(*inputs)

    return with_any_tokens


@functools.lru_cache(maxsize=1)  # numbers of tokens share a compilation
def candidates(
    name: str, n: int, c: int, settings: Settings, smoke: bool
) -> tuple[dict[str, Implementation], dict[str, str]]:
    """Implementations by name of an op for one number of streams and width, and why others are left out."""
    found, left_out = {OURS: Implementation(fused(name, settings))}, {}
    if not smoke:
        found[COMPILED] = Implementation(compiled(name, settings))
    for peer, make in PEERS.items():
        if name in PEER_OPS[peer]:
            try:
                found[peer] = as_op(name, make(settings))
            except ImportError as reason:
                left_out[peer] = f"not installed ({reason})"
            except Exception as reason:  # an installation may be broken in any way, and the rest goes on
                left_out[peer] = in_short(reason, 120)
    return found, left_out


@torch._functorch.config.patch(donated_buffer=False)  # a compiled backward that gives its buffers away runs but once
def measure(run: KernelsConfig, name: str, n: int, c: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """One op at one size, all implementations in turn, round by round."""
    settings, dtype = Settings(run.iterations, 1e-6, 0.0), DTYPE[run.dtype]
    drawn = draw(n, c, tokens, dtype, torch.Generator(device).manual_seed(0))
    inputs = {key: drawn.pop(key) for key in ARGUMENTS[name]}
    few = {key: x[:TOKENS_TO_COMPARE] if key in PER_TOKEN else x for key, x in inputs.items()}
    calls = 1 if run.smoke else CALLS
    found, missing = candidates(name, n, c, settings, run.smoke)
    left_out = dict(missing)
    ready, errors = {}, {}
    for who, op in found.items():
        try:
            errors[who] = error(op, reference(name, settings), few)
            both = halves(op, inputs, calls)
            for half in both:
                half()
            ready[who] = both
        except Exception as reason:  # a peer may refuse a size in any way, and the rest goes on
            if who == OURS:
                raise
            left_out[who] = in_short(reason, 120)
    times: dict[str, list[list[float]]] = {who: [[], []] for who in ready}
    for _ in range(run.rounds):
        for who, both in ready.items():
            for half, own in zip(both, times[who], strict=True):
                own.append(busy(half, device, calls))
    must_move = bytes_to_move(name, n, c, tokens, dtype.itemsize)
    rows = {
        who: {
            "forward_ms": 1e3 * statistics.median(own[0]),
            "backward_ms": 1e3 * statistics.median(own[1]),
            "error": errors[who],
            "ours_faster": statistics.median((a + b) / (x + y) for a, b, x, y in zip(*own, *times[OURS], strict=True)),
        }
        for who, own in times.items()
    }
    sizes = {"op": name, "n": n, "c": c, "tokens": tokens}
    return {**sizes, "forward_bytes": must_move[0], "backward_bytes": must_move[1], "rows": rows, "left_out": left_out}


def run_tests() -> dict[str, int]:
    """The tests of the kernels on this GPU: how many passed, failed and were skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        arguments = ["-m", "gpu", "-q", *TESTS, f"--junitxml={report}"]
        subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT)
        suites = ElementTree.parse(report).getroot().iter("testsuite")
        counts = [
            {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")} for suite in suites
        ]
    total = {key: sum(count[key] for count in counts) for key in counts[0]}
    failed = total["failures"] + total["errors"]
    return {"passed": total["tests"] - failed - total["skipped"], "failed": failed, "skipped": total["skipped"]}


def main(run: KernelsConfig) -> int:
    """Test, measure, print, write; 1 where a test failed."""
    device = pick_device(run.device)
    if device.type != "cuda" and not (run.smoke and interpreted()):
        raise ValueError(
            "the kernels are measured on a CUDA device, and this is none; smoke=true with TRITON_INTERPRET=1 runs "
            "through one tiny size without measuring anything"
        )
    require_triton(device)
    widths, streams, tokens = SMOKE if run.smoke else (run.widths, run.streams, run.tokens)
    sizes = [(name, n, c, t) for name in run.ops for c in widths for n in streams for t in tokens]
    sizes.sort(key=lambda size: (size[1] != 4, size[2] < 2048))  # first what a model of a billion weights has
    capability = list(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None
    kind = "smoke" if capability is None else "".join(map(str, capability))
    name = f"kernels_{device.type}_{kind}_{run.dtype}.json"
    fresh: dict[str, Any] = {
        **provenance(device, ["torch", "triton", "liger_kernel", "transformer_engine", "tile_kernels"]),
        "command": " ".join(["python recipes/benchmark.py kernels", *sys.argv[1:]]),
        "source": code_version(),
        "smoke": run.smoke,
        "capability": capability,
        "dtype": run.dtype,
        "iterations": run.iterations,
        "tests": run_tests() if run.tests and not run.smoke else {},
        "sizes": [],
    }
    result = merged(fresh, Path(run.output_dir, name))
    tests = result["tests"]
    result["tests_passed"] = bool(tests) and tests["passed"] > 0 and not tests["failed"]
    file = write_result(run.output_dir, name, result)
    copied = {"copy_gb_per_s": copy_bandwidth(device) / 1e9, "date": result["date"], "command": result["command"]}
    for number, size in enumerate(sizes, 1):
        print("{}/{}: {}, n {}, c {}, {} tokens".format(number, len(sizes), *size), file=sys.stderr, flush=True)
        measured = measure(run, *size, device) | copied
        result["sizes"] = [*(other for other in result["sizes"] if size_of(other) != size), measured]
        # After each size, so that a run that is cut short leaves what it has measured.
        file = write_result(run.output_dir, name, result)
    print(table(result))
    print(f"written to {file}")
    return 1 if tests.get("failed") else 0


if __name__ == "__main__":
    command(KernelsConfig, __file__, main)
