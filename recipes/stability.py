"""The stability experiment: `python recipes/stability.py [key=value …]`; keys in configs/stability.yaml.

A deep narrow network, trained with the plain residual, unconstrained hyper-connections, mHC, and mHC whose residual
mapping is the identity, from several seeds each; the same seed means the same weights outside of mHC and the same data.
Prints a table and writes it as JSON, with two pictures. Run it on an otherwise idle machine.
"""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlm_mhc import ModelConfig, TrainConfig, fn
from rlm_mhc.data import Position, Prepared, builtin_source, jsonl_source, next_batch, prepare
from rlm_mhc.program import Program, TrainState, init_train_state, make_program
from rlm_mhc.testing.measure import provenance, write_result
from rlm_mhc.train import DataConfig, RunConfig, command, pick_device
from rlm_mhc.train.curves import label_axes, new_figure, save_figure
from rlm_mhc.train.device import check_compiler
from rlm_mhc.train.evaluate import evaluate
from rlm_mhc.validation import at_least, check, location, one_of, positive

VARIANTS: dict[str, dict[str, Any]] = {
    "residual": {"mhc_enabled": False},
    "hc": {"mhc_preset": "hc"},
    "mhc": {"mhc_preset": "paper"},
    "identity": {"mhc_preset": "identity"},
}
COLOURS = {"residual": "#333333", "hc": "#d6604d", "mhc": "#2166ac", "identity": "#5aae61"}
FINAL_SHARE = 0.05
EARLY_SHARE = 0.15
SPIKE = 3.0
MARKED_GAIN = 2.0
PROBED_SEQUENCES = 2
UNTIMED_STEPS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class StabilityConfig:
    """What to train, and how long."""

    layers: int = at_least(1, 48)
    width: int = at_least(1, 48)
    num_heads: int = at_least(1, 4)
    vocab_size: int = at_least(257, 512)
    length: int = at_least(1, 64)
    batch_size: int = at_least(1, 8)
    steps: int = at_least(2, 500)
    lr: float = positive(1e-2)
    warmup: int = at_least(0, 50)
    max_grad_norm: float = positive(1.0)
    seeds: int = at_least(1, 3)
    probes: int = at_least(1, 40)
    eval_batches: int = at_least(1, 32)
    train_path: str | None = location(None)
    compile: bool = True
    device: str = one_of("auto", "cpu", "cuda")
    work_dir: str = location("outputs/stability")
    output_dir: str = location("recipes/results")
    debug: bool = False

    def __post_init__(self) -> None:
        check(self)
        if self.warmup >= self.steps:
            raise ValueError(f"warmup={self.warmup}: expected fewer than steps={self.steps}")

    def of_variant(self, name: str) -> RunConfig:
        """The run of a variant."""
        model = ModelConfig(
            hidden_dim=self.width,
            num_layers=self.layers,
            num_heads=self.num_heads,
            vocab_size=self.vocab_size,
            max_seq_len=self.length,
            **VARIANTS[name],
        )
        training = TrainConfig(
            optimizer={"lr": self.lr},  # type: ignore[arg-type]
            scheduler={"warmup_steps": self.warmup},  # type: ignore[arg-type]
            batch_size=self.batch_size,
            gradient_accumulation_steps=1,
            max_steps=self.steps,
            mixed_precision="fp32",
            max_grad_norm=self.max_grad_norm,
            eval_batches=self.eval_batches,
            compile=self.compile,
        )
        return RunConfig(model=model, training=training, data=DataConfig(max_length=self.length))


@dataclasses.dataclass
class Run:
    """One training, by step; `forward` and `backward` are the gains by sub-layer at each of the steps `probed`, and
    `diverged` is the step whose loss or gradient was not finite, where it ended."""

    variant: str
    seed: int
    losses: list[float] = dataclasses.field(default_factory=list)
    grad_norms: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    probed: list[int] = dataclasses.field(default_factory=list)
    forward: list[list[float]] = dataclasses.field(default_factory=list)
    backward: list[list[float]] = dataclasses.field(default_factory=list)
    held_out: float | None = None
    diverged: int | None = None


def train_all(run: StabilityConfig, data: Prepared, device: torch.device) -> list[Run]:
    """Every variant from every seed; a variant is compiled once."""
    done = []
    for name in VARIANTS:
        config = run.of_variant(name)
        program = make_program(config.model, config.training, donate=True)
        for seed in range(run.seeds):
            start = time.perf_counter()
            done.append(train_one(run, name, seed, program, data, device))
            print(f"{said(done[-1])}, {time.perf_counter() - start:.0f} s", flush=True)
    return done


def train_one(
    run: StabilityConfig, name: str, seed: int, program: Program, data: Prepared, device: torch.device
) -> Run:
    """One variant from one seed, to its end or its divergence."""
    config, done, position = run.of_variant(name), Run(name, seed), Position(seed)
    state = init_train_state(config.model, config.training, seed=seed, device=device)
    probe(done, 0, state, config.model, data)
    for number in range(1, run.steps + 1):
        batch, position = next_batch(data.train, position, run.batch_size, shuffle=True)
        start = time.perf_counter()
        state, metrics = program.step(state, fn.Batch(*(x.to(device) for x in batch)))
        loss, norm = metrics["loss"].item(), metrics["grad_norm"].item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            done.diverged = number
            return done
        done.losses.append(loss)
        done.grad_norms.append(norm)
        done.seconds.append(time.perf_counter() - start)
        if number % max(1, run.steps // run.probes) == 0 or number == run.steps:
            probe(done, number, state, config.model, data)
    done.held_out = evaluate(program.loss_sum, state.params, config, data)
    return done


def probe(done: Run, number: int, state: TrainState, config: ModelConfig, data: Prepared) -> None:
    """Note the gains up to and from each sub-layer, the largest over the same held-out tokens every time; with the
    plain residual they are 1."""
    gains = [[1.0] * (2 * config.num_layers)] * 2
    if config.mhc_enabled:
        batch, _ = next_batch(data.evaluation, Position(0), PROBED_SEQUENCES, shuffle=False)
        with torch.no_grad():
            res = fn.backbone(state.params, batch.tokens.to(state.step.device), config).res
            gains = [gain.flatten(1).amax(-1).tolist() for gain in fn.cumulative_gain(torch.stack(res))]
    done.probed.append(number)
    done.forward.append(gains[0])
    done.backward.append(gains[1])


def said(done: Run) -> str:
    """A run in one line."""
    name = f"{done.variant:<9} seed {done.seed}: "
    if done.diverged is not None:
        return name + f"diverged at step {done.diverged}"
    return name + f"loss {final_loss(done):.3f}, held out {done.held_out:.3f}, gain {max(done.backward[-1]):.3g}"


def final_loss(done: Run) -> float:
    """The mean training loss of the last steps."""
    return statistics.fmean(done.losses[-max(1, round(FINAL_SHARE * len(done.losses))) :])


def spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Mean, smallest and largest of the values that there are."""
    known = [value for value in values if value is not None]
    return {"mean": statistics.fmean(known), "min": min(known), "max": max(known)} if known else None


def summary(run: StabilityConfig, name: str, runs: Sequence[Run]) -> dict[str, Any]:
    """A row of the table: what the seeds of a variant came to."""
    whole = [r for r in runs if r.diverged is None]
    norms = [r.grad_norms[run.warmup :] for r in runs]
    return {
        "name": name,
        "parameters": fn.count(run.of_variant(name).model),
        "training_loss": spread(map(final_loss, whole)),
        "held_out_loss": spread(r.held_out for r in whole),
        "diverged_at": {str(r.seed): r.diverged for r in runs if r.diverged is not None},
        "largest_grad_norm": max((max(n) for n in norms if n), default=None),
        "spikes": sum(norm > SPIKE * statistics.median(n) for n in norms for norm in n),
        "largest_gain_forward": max(max(map(max, r.forward)) for r in runs),
        "largest_gain_backward": max(max(map(max, r.backward)) for r in runs),
        "final_gain_backward": spread(max(r.backward[-1]) for r in whole),
        "step_ms": 1e3 * statistics.median([s for r in runs for s in r.seconds[UNTIMED_STEPS:] or r.seconds] or [0.0]),
    }


def report(run: StabilityConfig, runs: Sequence[Run], device: torch.device) -> dict[str, Any]:
    """Everything measured, as JSON values."""
    return {
        **provenance(device, ["torch", "numpy", "transformers", "tokenizers"]),
        "config": dataclasses.asdict(run),
        "rows": [summary(run, name, [r for r in runs if r.variant == name]) for name in VARIANTS],
    }


def table(result: dict[str, Any]) -> str:
    """The result for people, in Markdown."""
    heads = ["parameters", "training loss", "held-out loss", "diverged", "largest gradient norm", "spikes"]
    heads += ["largest backward gain", "at the end", "ms per step"]
    lines = [f"{result['device']}, {result['processor']}, {result['date']}"]
    lines.append(", ".join(f"{name} {number}" for name, number in result["versions"].items()))
    lines += ["", f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for r in result["rows"]:
        norm = "–" if r["largest_grad_norm"] is None else f"{r['largest_grad_norm']:.2f}"
        cells = [r["name"], f"{r['parameters']:,}", in_words(r["training_loss"]), in_words(r["held_out_loss"])]
        cells += [f"{len(r['diverged_at'])} of {result['config']['seeds']}", norm, str(r["spikes"])]
        cells += [f"{r['largest_gain_backward']:.4g}", in_words(r["final_gain_backward"], ".4g"), f"{r['step_ms']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def in_words(values: dict[str, float] | None, form: str = ".3f") -> str:
    """Mean and range."""
    if values is None:
        return "–"
    mean, low, high = (format(values[name], form) for name in ("mean", "min", "max"))
    return mean if low == high else f"{mean} ({low} to {high})"


def smoothed(run: StabilityConfig, runs: Sequence[Run], name: str) -> np.ma.MaskedArray:
    """`[seeds, steps]`: means of the training loss over the last steps, masked before the first and where a seed has
    diverged."""
    window = max(1, run.steps // 25)
    curves = np.full((run.seeds, run.steps), np.nan)
    for r in runs:
        if r.variant == name and len(r.losses) >= window:
            curves[r.seed, window - 1 : len(r.losses)] = np.convolve(r.losses, np.full(window, 1 / window), "valid")
    return np.ma.masked_invalid(curves)


def draw_losses(run: StabilityConfig, runs: Sequence[Run], file: Path, title: str) -> None:
    """Training loss by variant, and its difference to the plain residual's from the same seed: mean over seeds, and
    from the smallest to the largest."""
    figure = new_figure(12, 4.8)
    plain = smoothed(run, runs, "residual")
    panels = ("training loss", "nats per token", 0.0), ("difference to residual, same seed", "nats per token", plain)
    for axes, (name, label, minus) in zip(figure.subplots(1, 2), panels, strict=True):
        late = []
        for variant, colour in COLOURS.items():
            curves = smoothed(run, runs, variant) - minus
            steps = np.arange(1, run.steps + 1)
            axes.plot(steps, curves.mean(0), color=colour, label=variant, linewidth=1.4)
            axes.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0)
            late.append(curves[:, int(EARLY_SHARE * run.steps) :].compressed())
        limit_to(axes, np.concatenate(late))
        label_axes(axes, name, label)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    save_figure(figure, file, title)


def limit_to(axes: Any, values: np.ndarray) -> None:
    """Show these values, and not the fall from the first loss, beside which they would look alike."""
    if len(values):
        margin = 0.04 * max(np.ptp(values), 1e-3)
        axes.set_ylim(values.min() - margin, values.max() + margin)


def draw_gains(runs: Sequence[Run], file: Path, title: str) -> None:
    """The backward gain from each sub-layer over steps, by variant, the geometric mean over seeds, in one scale that
    makes small gains look alike: a white line marks where they pass 2."""
    figure = new_figure(13, 4.8)
    from matplotlib.colors import LogNorm

    names = [name for name in VARIANTS if name != "residual"]
    grids = {name: mean_gains([r for r in runs if r.variant == name]) for name in names}
    every = np.concatenate([gains.ravel() for _, gains in grids.values()])
    # Without the floor, the rounding of exact gains would fill the scale.
    norm = LogNorm(vmin=min(1.0, every.min()), vmax=max(MARKED_GAIN, every.max()))
    panels = figure.subplots(1, len(names), sharey=True)
    for axes, (name, (steps, gains)) in zip(panels, grids.items(), strict=True):
        mesh = axes.pcolormesh(steps, np.arange(len(gains)), gains, norm=norm, cmap="viridis", shading="nearest")
        if gains.min() < MARKED_GAIN < gains.max():
            axes.contour(steps, np.arange(len(gains)), gains, [MARKED_GAIN], colors="white", linewidths=1.0)
        label_axes(axes, f"{name}: {gains.min():.4g} to {gains.max():.4g}", "")
    panels[0].set_ylabel("sub-layer (0 is next to the embedding)")
    bar = figure.colorbar(mesh, ax=list(panels))
    bar.set_label(f"backward gain from the top to the sub-layer; white line: {MARKED_GAIN:g}")
    save_figure(figure, file, title)


def mean_gains(runs: Sequence[Run]) -> tuple[list[int], np.ndarray]:
    """The steps probed and `[sub-layers, steps]`, the geometric mean over the seeds that got there."""
    longest = max(runs, key=lambda r: len(r.probed))
    means = [
        np.exp(np.mean([np.log(r.backward[k]) for r in runs if len(r.probed) > k], axis=0))
        for k in range(len(longest.probed))
    ]
    return longest.probed, np.stack(means, axis=-1)


def main(run: StabilityConfig) -> None:
    """Train, print, write, draw."""
    device = pick_device(run.device)
    check_compiler(device, run.compile)
    results, work = Path(run.output_dir), Path(run.work_dir)
    source = jsonl_source(run.train_path, key="train_path") if run.train_path else builtin_source()
    tokens = work / "tokens"
    data = prepare(tokens, source, None, tokenizer="auto", vocab_size=run.vocab_size, max_length=run.length)
    if data.evaluation.total < 1:
        raise ValueError(f"train_path={run.train_path}: too little text to hold any out")

    runs = train_all(run, data, device)
    (work / "series.json").write_text(json.dumps([dataclasses.asdict(r) for r in runs]) + "\n", encoding="utf-8")
    result = report(run, runs, device)
    print(table(result))
    file = write_result(results, f"stability_{device.type}_{run.width}x{run.layers}.json", result)
    title = (
        f"{run.layers} layers of width {run.width}, learning rate {run.lr:g}, {run.seeds} seed{'s' * (run.seeds > 1)}"
    )
    draw_losses(run, runs, results / "stability_loss.png", title)
    draw_gains(runs, results / "stability_gain.png", title)
    print(f"written to {file}, stability_loss.png and stability_gain.png beside it, {work / 'series.json'}")


if __name__ == "__main__":
    command(StabilityConfig, __file__, main)
