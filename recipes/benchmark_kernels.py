"""The fused mixing beside the compiled reference and others: `python recipes/benchmark.py kernels [key=value …]`.

First the tests of the kernels on the GPU, then times. Prints a table and writes all of it as JSON, which is what
`training.kernels=auto` goes by once it is committed and named in `rlm_mhc/kernels/proven.py`. A run of some sizes adds
to what the file has of the same kernels on the same device. Run it on an otherwise idle GPU: times are what the device
works, medians of interleaved rounds, and shares are of the copy bandwidth measured in the same run.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
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
from rlm_mhc.kernels.selftest import ARGUMENTS, COMBINE, GIVEN, WEIGHTS, draw, fused, reference
from rlm_mhc.testing.kernel_peers import PEERS, Implementation, Op
from rlm_mhc.testing.measure import busy, copy_bandwidth, provenance, write_result
from rlm_mhc.train import command, pick_device
from rlm_mhc.validation import at_least, check, one_of, some_of

ROOT = Path(__file__).parents[1]
DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SMOKE = ((32,), (2,), (5,))
TOKENS_TO_COMPARE = 512
CALLS = 10  # of one timing
BEYOND_CACHES = 10**8  # bytes: what a GPU's caches do not hold, and so many must move for a share of the bandwidth
SUB_LAYER = "sub_layer"
ARGUMENTS_OF = {**ARGUMENTS, SUB_LAYER: ("streams", "output", *WEIGHTS)}
PER_TOKEN = ("streams", *COMBINE, *GIVEN)
OURS, COMPILED = "ours", "compiled reference"
SAME = ("device", "versions", "source", "dtype", "iterations", "smoke")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """What to measure."""

    ops: tuple[str, ...] = some_of(*ARGUMENTS_OF)
    widths: tuple[int, ...] = some_of(768, 2048, 4096)
    streams: tuple[int, ...] = some_of(2, 4, 8)
    tokens: tuple[int, ...] = some_of(4096, 16384, 32768)
    dtype: str = one_of("bf16", "fp16", "fp32")
    iterations: int = at_least(1, 20)
    rounds: int = at_least(1, 15)
    tests: bool = True
    smoke: bool = False
    device: str = one_of("auto", "cpu", "cuda")
    output_dir: str = "recipes/results"
    debug: bool = False

    def __post_init__(self) -> None:
        check(self)


def ours(name: str, settings: Settings) -> Op:
    """The fused op of a name; of the sub-layer `mix_pre`, then `mix_post` of an output that is given."""
    if name != SUB_LAYER:
        return fused(name, settings)
    return sub_layer_of(fused("mix_pre", settings), fused("mix_post", settings))


def plain(name: str, settings: Settings) -> Op:
    """The same by the functions of `rlm_mhc.fn`."""
    if name != SUB_LAYER:
        return reference(name, settings)
    return sub_layer_of(reference("mix_pre", settings), reference("mix_post", settings))


def sub_layer_of(pre: Op, post: Op) -> Op:
    """`(normed, mixed)` of a sub-layer whose output does not depend on its input."""

    def run(streams: Tensor, output: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        normed, _, own_post, res = pre(streams, *weights)
        return normed, *post(streams, output, own_post, res)

    return run


def bytes_to_move(name: str, n: int, c: int, tokens: int, itemsize: int) -> tuple[int, int]:
    """What forward and backward must read and write at least, all weights once; see the ops' READMEs."""
    raw, given = 2 * n + n * n, 4 * n * tokens * name.startswith("single_pass")
    mappings, phi = 4 * tokens * raw, 4 * n * c * raw
    streams = c * itemsize * tokens
    post = (2 * n + 1) * streams + mappings, (3 * n + 2) * streams + 2 * mappings
    pre = (n + 1) * streams + mappings + phi, (2 * n + 1) * streams + 2 * mappings + 2 * phi
    if name == "mix_post":
        return post
    if name == SUB_LAYER:
        return post[0] + pre[0], post[1] + pre[1]
    if name.endswith("post_pre"):
        both = (2 * n + 2) * streams + 2 * mappings + phi, (3 * n + 3) * streams + 4 * mappings + 2 * phi
        return both[0] + given, both[1] + 2 * given
    return pre[0] + given, pre[1] + 2 * given


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
        cotangents = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]

    ours = everything(lambda *leaves: op.run(*op.arrange(*leaves)), [*inputs.values()])
    theirs = everything(exact, [x.double() for x in inputs.values()])
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


def compiled(name: str, settings: Settings) -> Op:
    """The reference compiled for one width and number of streams and any number of tokens."""
    torch.compiler.reset()  # another width or number of streams is another compilation
    run = torch.compile(plain(name, settings), fullgraph=True)

    def with_any_tokens(*inputs: Tensor) -> tuple[Tensor, ...]:
        for key, x in zip(ARGUMENTS_OF[name], inputs, strict=True):
            if key in PER_TOKEN:
                torch._dynamo.mark_dynamic(x, 0)
        return run(*inputs)

    return with_any_tokens


@functools.lru_cache(maxsize=1)  # numbers of tokens share a compilation
def candidates(
    name: str, n: int, c: int, settings: Settings, smoke: bool
) -> tuple[dict[str, Implementation], dict[str, str]]:
    """Implementations by name of an op for one number of streams and width, and why others are left out."""
    found, left_out = {OURS: Implementation(ours(name, settings))}, {}
    if not smoke:
        found[COMPILED] = Implementation(compiled(name, settings))
    for peer, make in PEERS.items() if name == SUB_LAYER else ():
        try:
            found[peer] = make(settings)
        except ImportError as reason:
            left_out[peer] = f"not installed ({reason})"
    return found, left_out


@torch._functorch.config.patch(donated_buffer=False)  # a compiled backward that gives its buffers away runs but once
def measure(run: KernelsConfig, name: str, n: int, c: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """One op at one size, all implementations in turn, round by round."""
    settings, dtype = Settings(run.iterations, 1e-6, 0.0), DTYPE[run.dtype]
    drawn = draw(n, c, tokens, dtype, torch.Generator(device).manual_seed(0))
    inputs = {key: drawn.pop(key) for key in ARGUMENTS_OF[name]}
    few = {key: x[:TOKENS_TO_COMPARE] if key in PER_TOKEN else x for key, x in inputs.items()}
    calls = 1 if run.smoke else CALLS
    found, missing = candidates(name, n, c, settings, run.smoke)
    left_out = dict(missing)
    ready, errors = {}, {}
    for who, op in found.items():
        try:
            errors[who] = error(op, plain(name, settings), few)
            both = halves(op, inputs, calls)
            for half in both:
                half()
            ready[who] = both
        except Exception as reason:  # a peer may refuse a size in any way, and the rest goes on
            if who == OURS:
                raise
            left_out[who] = f"{type(reason).__name__}: {' '.join(str(reason).split())[:120]}"
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
        arguments = ["-m", "gpu", "-q", "tests/kernels", "tests/train/test_kernels.py", f"--junitxml={report}"]
        subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT)
        suites = ElementTree.parse(report).getroot().iter("testsuite")
        counts = [
            {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")} for suite in suites
        ]
    total = {key: sum(count[key] for count in counts) for key in counts[0]}
    failed = total["failures"] + total["errors"]
    return {"passed": total["tests"] - failed - total["skipped"], "failed": failed, "skipped": total["skipped"]}


def table(result: dict[str, Any]) -> str:
    """The result for people."""

    def share(moved: int, milliseconds: float, copied: float) -> str:
        return f"{moved / (1e6 * milliseconds * copied):.1%}" if moved >= BEYOND_CACHES else "-"

    lines = [f"{result['device']}, {result['dtype']}, {result['date']}"]
    head = ("fwd ms", "of copy", "bwd ms", "of copy", "error", "ours is")
    lines.append(f"{'op':<22}{'n':>3}{'c':>6}{'tokens':>8}  {'':<20}" + "".join(f"{word:>9}" for word in head))
    for m in result["sizes"]:
        for who, r in m["rows"].items():
            shares = [share(m[f"{x}_bytes"], r[f"{x}_ms"], m["copy_gb_per_s"]) for x in ("forward", "backward")]
            lines.append(
                f"{m['op']:<22}{m['n']:>3}{m['c']:>6}{m['tokens']:>8}  {who:<20}"
                f"{r['forward_ms']:>9.3f}{shares[0]:>9}{r['backward_ms']:>9.3f}{shares[1]:>9}"
                f"{r['error']:>9.0e}{r['ours_faster']:>8.2f}×"
            )
    reasons = {f"{who}: {why}" for m in result["sizes"] for who, why in m["left_out"].items()}
    return "\n".join([*lines, *(f"left out {reason}" for reason in sorted(reasons))])


def source_digest() -> str:
    """Of the kernels' source: what was measured or tested of other source says nothing of this one."""
    files = sorted((ROOT / "rlm_mhc" / "kernels").rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def merged(result: dict[str, Any], file: Path) -> dict[str, Any]:
    """A result with the tests and sizes that a file has of the same source, device, versions and settings."""
    if not file.is_file():
        return result
    earlier = json.loads(file.read_text(encoding="utf-8"))
    if differing := [key for key in SAME if earlier.get(key) != result[key]]:
        print(f"{file} is of another {' and '.join(differing)}: it is replaced", file=sys.stderr)
        return result
    return result | {"tests": result["tests"] or earlier["tests"], "sizes": earlier["sizes"]}


def size_of(measured: dict[str, Any]) -> tuple[Any, ...]:
    """What tells one measurement from another."""
    return tuple(measured[key] for key in ("op", "n", "c", "tokens"))


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
        "source": source_digest(),
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
