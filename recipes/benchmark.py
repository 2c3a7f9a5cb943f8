"""Step time, memory and compile time beside other libraries: `python recipes/benchmark.py [key=value …]`.

`python recipes/benchmark.py decode [key=value …]` measures decoding, and `kernels` the fused operations: see
`benchmark_decode.py` and `benchmark_kernels.py` beside this file.

Prints a table and writes it as JSON. Run it on an otherwise idle machine: times are medians of interleaved rounds, and
ratios medians of the ratios within a round.
"""

import dataclasses
import gc
import importlib.util
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlm_mhc import ModelConfig, TrainConfig, fn
from rlm_mhc.kernels.mixing import TRITON, refusal
from rlm_mhc.program import make_train_step
from rlm_mhc.program.monitors import join, mhc_metrics, sample
from rlm_mhc.program.precision import init_loss_scale
from rlm_mhc.program.state import resume_train_state
from rlm_mhc.testing.baselines import EagerPeer, Loss, llama
from rlm_mhc.testing.measure import copy_bandwidth, provenance, timed, write_result
from rlm_mhc.testing.memory import peak_bytes
from rlm_mhc.train import command, pick_device
from rlm_mhc.train.device import peak_rate, product_rate
from rlm_mhc.train.plan import flops_per_token
from rlm_mhc.tree import tree_map
from rlm_mhc.validation import at_least, check, location, one_of, section, some_of

DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OTHERS = ("decode", "kernels")
FUSED = "mHC, Triton kernels"
STEPS_PER_ROUND = {"cpu": 1, "cuda": 5}
MIB = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What to measure."""

    model: ModelConfig = section(ModelConfig)
    length: int = at_least(1, 256)
    batch_size: int = at_least(1, 4)
    mixed_precision: str = one_of("auto", "fp32", "bf16", "fp16")
    rounds: int = at_least(1, 15)
    remats: tuple[str, ...] = some_of("none", "mhc", "full")
    first_step: bool = True
    only_first_step: bool = False
    device: str = one_of("auto", "cpu", "cuda")
    seed: int = at_least(0, 42)
    output_dir: str = location("recipes/results")
    debug: bool = False

    def __post_init__(self) -> None:
        check(self)

    def precision(self, device: torch.device) -> str:
        """`mixed_precision`, decided."""
        return {"cpu": "fp32", "cuda": "bf16"}[device.type] if self.mixed_precision == "auto" else self.mixed_precision


@dataclasses.dataclass
class Subject:
    """`start()` makes a state and returns a step; times in seconds, memory in bytes beyond weights and optimizer."""

    name: str
    start: Callable[[], Callable[[], Tensor]]
    flops: float
    first: float = 0.0
    times: list[float] = dataclasses.field(default_factory=list)
    peak: int = 0


def program(
    run: BenchmarkConfig, batch: fn.Batch, mhc: bool, remat: str, kernels: fn.Kernels = fn.REFERENCE
) -> Callable[[], Callable[[], Tensor]]:
    """Our train step."""
    device = batch.tokens.device
    config = run.model.replace(mhc_enabled=mhc)
    training = TrainConfig(
        batch_size=run.batch_size,
        gradient_accumulation_steps=1,
        mixed_precision=run.precision(device),
        remat=remat,
    )
    step = make_train_step(config, training, kernels=kernels, donate=True)

    def start() -> Callable[[], Tensor]:
        torch.manual_seed(run.seed)
        # Drawn on the device: only the time of a step counts, and a billion weights take long to draw on a CPU.
        shapes = fn.init(config, device="meta")
        params = tree_map(lambda w: torch.empty_like(w, device=device).normal_(std=0.02), shapes)
        loss_scale = init_loss_scale(training.mixed_precision, device)
        box = [resume_train_state(params, fn.adamw_init(params), 0, loss_scale)]

        def once() -> Tensor:
            box[0], metrics = step(box[0], batch)
            return metrics["loss"]

        return once

    return start


def module(run: BenchmarkConfig, batch: fn.Batch, make: Callable[[], nn.Module]) -> Callable[[], Callable[[], Tensor]]:
    """A module whose call gives the loss, under plain autograd, autocast and torch's fused AdamW."""
    device, dtype = batch.tokens.device, DTYPE[run.precision(batch.tokens.device)]

    def start() -> Callable[[], Tensor]:
        torch.manual_seed(run.seed)
        with device:
            model = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

        def once() -> Tensor:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = model(batch.tokens, batch.targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return once

    return start


def subjects(run: BenchmarkConfig, batch: fn.Batch, device: torch.device) -> list[Subject]:
    """Everything that is measured side by side; on CUDA with the Triton kernels too, where they serve the model."""
    fused = device.type == "cuda" and importlib.util.find_spec("triton") and not refusal(run.model)
    with_mhc, without = (
        flops_per_token(run.model.replace(mhc_enabled=mhc), run.length) * batch.tokens.numel() for mhc in (True, False)
    )
    plain = run.model.replace(mhc_enabled=False)
    found = [
        *(Subject(f"mHC, remat={remat}", program(run, batch, True, remat), with_mhc) for remat in run.remats),
        *(
            Subject(f"{FUSED}, remat={remat}", program(run, batch, True, remat, TRITON), with_mhc)
            for remat in (run.remats if fused else ())
        ),
        Subject("no mHC", program(run, batch, False, "none"), without),
        Subject("transformers Llama, compiled", module(run, batch, lambda: torch.compile(Loss(llama(plain)))), without),
    ]
    if importlib.util.find_spec("hyper_connections"):
        found.append(
            Subject("hyper-connections, eager", module(run, batch, lambda: Loss(EagerPeer(run.model))), with_mhc)
        )
    return found


def measure(found: list[Subject], device: torch.device, rounds: int) -> None:
    """First steps and memory one by one, then the rounds; on CUDA a subject's state lives only while it runs."""
    steps: dict[str, Callable[[], Tensor]] = {}
    for subject in found:
        step = subject.start()
        subject.first = timed(step, device)
        timed(step, device)
        subject.peak = peak_bytes(step, device)
        if device.type == "cpu":
            steps[subject.name] = step
        print(f"{subject.name}: first step {subject.first:.1f} s", file=sys.stderr, flush=True)
        del step
    for _ in range(rounds):
        for subject in found:
            step = steps.get(subject.name) or subject.start()
            timed(step, device)
            subject.times.append(timed(step, device, STEPS_PER_ROUND[device.type]))
            del step


def monitors_seconds(run: BenchmarkConfig, device: torch.device) -> float:
    """What a step spends on monitoring mHC: sampling every layer, uncompiled, and the metrics of all; the median."""
    n, layers = run.model.mhc_flows, run.model.num_layers
    streams = torch.randn(run.batch_size, run.length, n, run.model.hidden_dim, dtype=torch.float32, device=device)
    res = fn.sinkhorn_knopp(torch.randn(run.batch_size, run.length, n, n, dtype=torch.float32, device=device))

    def monitor() -> Tensor:
        return mhc_metrics(join([sample((res, res), streams) for _ in range(layers)]), streams)["mhc/gain_backward"]

    return statistics.median(timed(monitor, device) for _ in range(20))


def first_step_seconds(layers: int) -> float | None:
    """The first step of a model of so many layers, in a process of its own with an empty compile cache; None where
    that fails, for memory for one."""
    with tempfile.TemporaryDirectory() as cache:
        arguments = [a for a in sys.argv[1:] if not a.startswith(("model.num_layers", "first_step", "only_first_step"))]
        done = subprocess.run(
            [sys.executable, __file__, *arguments, f"model.num_layers={layers}", "only_first_step=true"],
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        print(f"the first step at {layers} layers failed: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return float(done.stdout.strip().splitlines()[-1])


def ratio(a: Subject, b: Subject) -> float:
    """The median of `a / b` within a round."""
    return statistics.median(x / y for x, y in zip(a.times, b.times, strict=True))


def report(run: BenchmarkConfig, found: list[Subject], device: torch.device) -> dict[str, Any]:
    """Everything measured, as JSON values."""
    dtype = DTYPE[run.precision(device)]
    peak, basis = peak_rate(device, dtype)
    bandwidth = copy_bandwidth(device)
    tokens = run.batch_size * run.length
    named = {subject.name: subject for subject in found}
    first = f"remat={run.remats[0]}"
    ours, plain, theirs = (named[name] for name in (f"mHC, {first}", "no mHC", "transformers Llama, compiled"))
    ratios = {"mHC / no mHC": ratio(ours, plain), "no mHC / transformers Llama": ratio(plain, theirs)}
    if fused := named.get(f"{FUSED}, {first}"):
        ratios |= {f"{FUSED} / no mHC": ratio(fused, plain), f"mHC / {FUSED}": ratio(ours, fused)}
    if peer := named.get("hyper-connections, eager"):
        ratios["hyper-connections / mHC"] = ratio(peer, ours)
    n, c = run.model.mhc_flows, run.model.hidden_dim
    moved = 2 * run.model.num_layers * ((2 * n + 2) + (3 * n + 3) - 8) * c * dtype.itemsize * tokens
    rows = [
        {
            "name": s.name,
            "first_step_s": s.first,
            "step_ms": 1e3 * statistics.median(s.times),
            "step_ms_min": 1e3 * min(s.times),
            "tokens_per_s": tokens / statistics.median(s.times),
            "tflops": s.flops / statistics.median(s.times) / 1e12,
            "mfu": s.flops / statistics.median(s.times) / peak,
            "peak_mib": s.peak / MIB,
        }
        for s in found
    ]
    return {
        **provenance(device, ["torch", "transformers", "hyper_connections", "triton"]),
        "precision": run.precision(device),
        "tokens_per_step": tokens,
        "model": dataclasses.asdict(run.model),
        "rows": rows,
        "ratios": ratios,
        "peak_basis": basis,
        "copy_gb_per_s": bandwidth / 1e9,
        "product_tflops": product_rate(device, dtype) / 1e12,
        "mhc_extra_ms": 1e3 * (statistics.median((fused or ours).times) - statistics.median(plain.times)),
        "mhc_floor_ms": 1e3 * moved / bandwidth,
        "monitors_ms": 1e3 * monitors_seconds(run, device),
        "first_step_s": {},
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{result['device']}, {result['processor']}, {result['precision']}, {result['date']}"]
    lines.append(", ".join(f"{name} {number}" for name, number in result["versions"].items()))
    lines.append(
        f"{'':<33}{'first s':>9}{'ms/step':>9}{'best':>8}{'tokens/s':>11}{'TFLOP/s':>9}{'MFU':>7}{'peak MiB':>10}"
    )
    for r in result["rows"]:
        lines.append(
            f"{r['name']:<33}{r['first_step_s']:>9.1f}{r['step_ms']:>9.1f}{r['step_ms_min']:>8.1f}"
            f"{r['tokens_per_s']:>11,.0f}{r['tflops']:>9.3f}{r['mfu']:>7.1%}{r['peak_mib']:>10,.0f}"
        )
    lines += [f"{name}: {value:.3f}" for name, value in result["ratios"].items()]
    lines.append(f"peak rate {result['peak_basis']}; matrix product {result['product_tflops']:.3f} TFLOP/s")
    lines.append(
        f"copy {result['copy_gb_per_s']:.1f} GB/s; mHC costs {result['mhc_extra_ms']:.1f} ms, and the bytes that it "
        f"must move {result['mhc_floor_ms']:.1f} ms"
    )
    ours = result["rows"][0]["step_ms"]
    lines.append(f"monitors {result['monitors_ms']:.2f} ms of a step, {result['monitors_ms'] / ours:.2%}")
    return "\n".join(lines)


def main(run: BenchmarkConfig) -> None:
    """Measure, print, write."""
    device = pick_device(run.device)
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # a peer that falls back to eager is no peer
    generator = torch.Generator().manual_seed(run.seed)
    window = torch.randint(
        run.model.vocab_size, (run.batch_size, run.length + 1), generator=generator, dtype=torch.int64, device="cpu"
    ).to(device)
    batch = fn.Batch(window[:, :-1].contiguous(), window[:, 1:].contiguous())
    if run.only_first_step:
        print(timed(program(run, batch, run.model.mhc_enabled, "none")(), device))
        return
    found = subjects(run, batch, device)
    measure(found, device, run.rounds)
    result = report(run, found, device)
    print(table(result))
    found.clear()
    gc.collect()
    torch.cuda.empty_cache()  # for the processes that follow
    for layers in (4, 24) if run.first_step else ():
        result["first_step_s"][str(layers)] = seconds = first_step_seconds(layers)
        print(f"first step at {layers} layers, empty cache: {f'{seconds:.1f} s' if seconds else 'failed'}")
    name = f"benchmark_{device.type}_{run.model.hidden_dim}x{run.model.num_layers}_{run.precision(device)}.json"
    print(f"written to {write_result(run.output_dir, name, result)}")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in OTHERS:
        other = Path(__file__).with_name(f"benchmark_{sys.argv.pop(1)}.py")
        runpy.run_path(str(other), run_name="__main__")
    command(BenchmarkConfig, __file__, main)
