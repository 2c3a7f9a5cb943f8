"""The training loop: batches in, metrics, pictures and checkpoints out."""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rlm_mhc import fn
from rlm_mhc.data import Prepared, next_batch
from rlm_mhc.parallel import ALONE, Ranks
from rlm_mhc.program.state import TrainState
from rlm_mhc.program.step import Program
from rlm_mhc.train.curves import draw_curves
from rlm_mhc.train.evaluate import evaluate
from rlm_mhc.train.guard import Guard
from rlm_mhc.train.log import MetricsLog, by_layer
from rlm_mhc.train.output import CURVES_FILE
from rlm_mhc.train.plan import Plan
from rlm_mhc.train.run_config import RunConfig
from rlm_mhc.train.save import Saver
from rlm_mhc.train.signals import Request, Signals
from rlm_mhc.train.start import Start
from rlm_mhc.validation import in_short

SECONDS_BETWEEN_PICTURES = 15.0


def train(
    run: RunConfig,
    start: Start,
    program: Program,
    data: Prepared,
    plan: Plan,
    log: MetricsLog | None = None,
    report: Callable[[dict[str, Any]], object] = lambda record: None,
    ranks: Ranks = ALONE,
    signals: Signals | None = None,
) -> TrainState:
    """Update `state` until `max_steps`, or until a signal asks for the end, logging, evaluating, drawing and saving.

    Args:
        run: the whole config.
        start: where to start; with a donating step its state must not be used afterwards.
        program: of `make_program`.
        data: what to train and evaluate on.
        plan: of `make_plan`, for tokens and operations per step.
        log: receives one record per logged step; None on the ranks that do not write.
        report: receives the same records, for wandb and the like.
        ranks: who takes part; only the first logs, draws and saves.
        signals: of `watch_signals`; None: nobody asks for anything.

    Raises:
        ValueError: when `training.max_bad_steps` steps in a row had no finite loss and gradient.
        OSError: when the last checkpoint could not be written; failures before it are told of.
    """
    training, (state, position, seen, watched, trainable) = run.training, start
    first = int(state.step)
    seen -= first * plan.tokens_per_step
    device = state.step.device
    session = _Session(log, report, run, plan) if log is not None else None
    warn_of_mhc = _HealthWarning(run) if ranks.is_first else lambda record: None
    speed = _Speed(plan)
    saver = Saver(run, data, ranks, trainable)
    guard = Guard(run, watched, saver.save_bad_step, ranks.is_first, trainable.model_of)
    if first == 0 and run.evaluates_first:
        loss = evaluate(program.loss_sum, trainable.model_of(state.params), run, data, ranks)
        if session and loss is not None:
            session.write(_without_nan({"step": 0, "tokens": 0, "eval/loss": loss}))
    with saver, _bar(training.max_steps, first, ranks) as bar:
        for number in range(first + 1, training.max_steps + 1):
            batch, position = next_batch(
                data.train,
                position,
                training.sequences_per_step,
                shuffle=run.data.shuffle,
                rank=ranks.rank,
                world=ranks.world,
            )
            batch = fn.Batch(*(x.to(device, non_blocking=True) for x in batch))
            state, metrics = program.step(state, batch)
            guard.inspect(number, batch, state, metrics)
            asked = signals.agreed() if signals else Request()
            last = number == training.max_steps
            saved = last or number % training.save_steps == 0
            evaluated = last or number == 1 or number % training.eval_steps == 0
            drawn = False
            if evaluated or saved or number % training.logging_steps == 0:
                record = _record(number, seen + number * plan.tokens_per_step, metrics) | guard.counts()
                record |= {"data/bad_fraction": data.bad_fraction} | speed.read(number) | saver.stall()
                record |= _peak_memory(device)
                if evaluated:
                    record["eval/loss"] = evaluate(program.loss_sum, trainable.model_of(state.params), run, data, ranks)
                record = _without_nan(record)
                drawn = session.write(record) if session else False
                warn_of_mhc(record)
                bar.set_postfix_str(_postfix(record), refresh=False)
            bar.update()
            if saved or asked.save or asked.stop:
                if log:
                    log.retry()
                saver.save(state, position, seen + number * plan.tokens_per_step, guard.values())
            if evaluated or saved or asked.save or drawn or number == first + 1:
                # None of these, nor the first step, which compiles, says anything about speed.
                speed.restart(number)
            if asked.stop:
                break
        guard.settle()
        saver.finish()
    if session and first < training.max_steps:
        session.draw()
    return state


def _bar(total: int, initial: int, ranks: Ranks) -> Any:
    # In a file every refresh is a line of its own.
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total,
        initial=initial,
        desc="training",
        unit="step",
        mininterval=interval,
        maxinterval=2 * interval,
        disable=not ranks.is_first,
    )


class _Session:
    """The log and the picture of it, redrawn at most every few seconds."""

    def __init__(self, log: MetricsLog, report: Callable, run: RunConfig, plan: Plan) -> None:
        self.log, self.report = log, report
        self.picture = Path(run.output_dir) / CURVES_FILE
        self.title = f"{self.picture.parent.name}: {plan.params:,} parameters"
        self.drawn = -math.inf

    def write(self, record: dict[str, Any]) -> bool:
        """Log a record; true where the picture was due as well, and drawn."""
        self.log.write(by_layer(record))
        self.report(record)
        due = time.monotonic() - self.drawn > SECONDS_BETWEEN_PICTURES
        if due:
            self.draw()
        return due

    def draw(self) -> None:
        """Draw, where disk and matplotlib allow it."""
        try:
            draw_curves(self.log.records, self.picture, self.title)
        except Exception as error:
            tqdm.write(f"{self.picture} could not be written: {in_short(error)}; the training goes on")
        self.drawn = time.monotonic()


def _peak_memory(device: torch.device) -> dict[str, float]:
    """Return the most GPU memory, in GiB, that tensors took since the last reading; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"gpu_peak_memory_gib": peak / 2**30}


class _Speed:
    """Tokens per second since the last reading, and the share of the device's peak that they take."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.since, self.number = plan, math.nan, -1

    def restart(self, number: int) -> None:
        self.since, self.number = time.perf_counter(), number

    def read(self, number: int) -> dict[str, float]:
        steps = (number - self.number) / (time.perf_counter() - self.since) if self.number >= 0 else math.nan
        self.restart(number)
        if math.isnan(steps):
            return {}
        mfu = steps * self.plan.flops_per_step / self.plan.peak_rate
        return {"tokens_per_sec": steps * self.plan.tokens_per_step, "mfu": mfu}


def _record(number: int, tokens: int, metrics: dict[str, Tensor]) -> dict[str, Any]:
    names = {"loss": "train/loss", "lr": "train/lr"}
    values = torch.stack([value.detach().double() for value in metrics.values()]).tolist()  # one wait for all of them
    named = {names.get(key, key): value for key, value in zip(metrics, values, strict=True)}
    return {"step": number, "tokens": tokens, **named}


def _without_nan(record: dict[str, Any]) -> dict[str, Any]:
    """None for every number that is not finite, which JSON has no word for."""
    return {key: value if value is None or math.isfinite(value) else None for key, value in record.items()}


class _HealthWarning:
    """Says once that the residual mappings amplify more than they should, and what to do."""

    def __init__(self, run: RunConfig) -> None:
        self.target, self.preset, self.said = run.mhc.target_amax, run.model.mhc_preset, False

    def __call__(self, record: dict[str, Any]) -> None:
        watched = {name: record[f"mhc/{name}"] for name in ("amax_pre", "amax_post", "gain_forward", "gain_backward")}
        name, value = max(watched.items(), key=lambda item: item[1] or 0.0)
        if self.said or value is None or value <= self.target:
            return
        self.said = True
        remedy = (
            "use model.mhc_preset=paper, which constrains them"
            if self.preset == "hc"
            else "raise model.mhc_sinkhorn_iters, or use an exact model.mhc_projection (permutations, kronecker, "
            "orthostochastic), or lower training.optimizer.lr"
        )
        tqdm.write(
            f"step {record['step']}: the residual mappings amplify: mhc/{name} is {value:.3g}, above "
            f"mhc.target_amax={self.target:g}; {remedy}"
        )


def _postfix(record: dict[str, Any]) -> str:
    shown = [f"loss {record['train/loss']:.3f}" if record["train/loss"] is not None else "skipped"]
    if record.get("eval/loss") is not None:
        shown.append(f"eval {record['eval/loss']:.3f}")
    if "tokens_per_sec" in record:
        shown.append(f"{record['tokens_per_sec']:,.0f} tokens/s")
    return ", ".join(shown)
