"""The parametrisations of `res` beside each other: `python recipes/projections.py [key=value …]`.

Errors over logit scales in fp32, then time and memory per token of each, forward and backward, as a train step runs
them. Prints a table and writes `projections_<device>.json`.
"""

import dataclasses
import statistics
import sys
from typing import Any

import torch
from torch import Tensor

from rlm_mhc import ModelConfig, fn
from rlm_mhc.program.hyper import projection_stage
from rlm_mhc.testing.measure import provenance, timed, write_result
from rlm_mhc.testing.memory import peak_bytes
from rlm_mhc.train import command, pick_device
from rlm_mhc.validation import at_least, check, location, one_of
from rlm_mhc.variants import PROJECTIONS

SCALES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
STREAMS = (2, 4, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectionsConfig:
    """What to measure."""

    tokens: int = at_least(1, 16384)
    rounds: int = at_least(1, 15)
    num_iters: int = at_least(1, 20)
    compile: bool = True
    device: str = one_of("auto", "cpu", "cuda")
    seed: int = at_least(0, 42)
    output_dir: str = location("recipes/results")
    debug: bool = False

    def __post_init__(self) -> None:
        check(self)


def errors(run: ProjectionsConfig, name: str, n: int, device: torch.device) -> dict[str, list[float]]:
    """The largest row and column error of normal raw numbers, by scale."""
    generator = torch.Generator().manual_seed(run.seed)
    raw = torch.randn(
        run.tokens, PROJECTIONS[name].raw_size(n), generator=generator, dtype=torch.float32, device="cpu"
    ).to(device)
    rows, columns = [], []
    for scale in SCALES:
        found = fn.stochasticity_error(fn.project(scale * raw, n, name, num_iters=run.num_iters))
        rows.append(found[0].max().item())
        columns.append(found[1].max().item())
    return {"row_error": rows, "column_error": columns}


def cost(run: ProjectionsConfig, name: str, n: int, device: torch.device) -> dict[str, float]:
    """Nanoseconds and bytes per token, forward and backward; bytes are the most allocated at once, results included."""
    config = ModelConfig(mhc_projection=name, mhc_flows=n, mhc_sinkhorn_iters=run.num_iters)
    stage = projection_stage(config)

    def forward(raw: Tensor) -> Tensor:
        return stage.forward({}, raw)[0]

    def backward(raw: Tensor, cotangent: Tensor) -> Tensor:
        return stage.backward({}, raw, (), cotangent)[1]

    if run.compile:
        torch._dynamo.reset()  # it counts what is compiled by line of code
        forward, backward = (torch.compile(half, fullgraph=True, dynamic=False) for half in (forward, backward))
    generator = torch.Generator().manual_seed(run.seed)
    raw = torch.randn(
        run.tokens, PROJECTIONS[name].raw_size(n), generator=generator, dtype=torch.float32, device="cpu"
    ).to(device)
    cotangent = torch.randn(run.tokens, n, n, generator=generator, dtype=torch.float32, device="cpu").to(device)
    measured = {}
    for half, call in (("forward", lambda: forward(raw)), ("backward", lambda: backward(raw, cotangent))):
        call()
        seconds = statistics.median(timed(call, device) for _ in range(run.rounds))
        measured[f"{half}_ns"] = 1e9 * seconds / run.tokens
        measured[f"{half}_bytes"] = peak_bytes(call, device) / run.tokens
    return measured


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: errors at the smallest and the largest scale and the worst of all, then costs."""
    lines = [
        "| projection | n | k | worst row error | column error at 0.1 / 1 / 10 / 30 | ns per token, forward + backward "
        "| bytes per token, forward / backward |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        columns = " / ".join(f"{row['column_error'][SCALES.index(scale)]:.0e}" for scale in (0.1, 1.0, 10.0, 30.0))
        lines.append(
            f"| `{row['name']}` | {row['n']} | {row['k']} | {max(row['row_error']):.0e} | {columns} "
            f"| {row['forward_ns']:.0f} + {row['backward_ns']:.0f} "
            f"| {row['forward_bytes']:.0f} / {row['backward_bytes']:.0f} |"
        )
    return "\n".join(lines)


def main(run: ProjectionsConfig) -> None:
    """Measure, print, write."""
    device = pick_device(run.device)
    rows = []
    for name, rule in PROJECTIONS.items():
        for n in STREAMS if name != "unconstrained" else ():
            if rule.fits(n):
                found = errors(run, name, n, device) | cost(run, name, n, device)
                rows.append({"name": name, "n": n, "k": rule.raw_size(n), **found})
                print(f"{name}, n={n}: measured", file=sys.stderr, flush=True)
    print(table(rows))
    result = {
        **provenance(device, ["torch"]),
        "tokens": run.tokens,
        "num_iters": run.num_iters,
        "compiled": run.compile,
        "scales": SCALES,
        "rows": rows,
    }
    print(f"written to {write_result(run.output_dir, f'projections_{device.type}.json', result)}")


if __name__ == "__main__":
    command(ProjectionsConfig, __file__, main)
