"""The training loop: batches in, metrics, pictures and checkpoints out."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rlm_mhc import fn
from rlm_mhc.checkpoint import save_run
from rlm_mhc.data import Position, Prepared, eval_batches, next_batch
from rlm_mhc.params import cast
from rlm_mhc.program.precision import COMPUTE_DTYPE
from rlm_mhc.program.state import TrainState
from rlm_mhc.program.step import TrainStep
from rlm_mhc.train.curves import draw_curves
from rlm_mhc.train.log import MetricsLog
from rlm_mhc.train.output import CHECKPOINTS, CONFIG_FILE, CURVES_FILE, write_config
from rlm_mhc.train.plan import Plan
from rlm_mhc.train.run_config import RunConfig
from rlm_mhc.train.start import Start

SECONDS_BETWEEN_PICTURES = 15.0


def train(
    run: RunConfig,
    start: Start,
    step: TrainStep,
    data: Prepared,
    plan: Plan,
    log: MetricsLog,
    report: Callable[[dict[str, Any]], object] = lambda record: None,
) -> TrainState:
    """Update `state` until `max_steps`, logging, evaluating, drawing and saving on the way.

    Args:
        run: the whole config.
        start: where to start; with a donating `step` its state must not be used afterwards.
        step: of `make_train_step`.
        data: what to train and evaluate on.
        plan: of `make_plan`, for tokens and operations per step.
        log: receives one record per logged step.
        report: receives the same records, for wandb and the like.

    Raises:
        ValueError: when the loss is no longer finite.
    """
    training, (state, position, seen) = run.training, start
    first = int(state.step)
    seen -= first * plan.tokens_per_step
    device = state.params.norm.weight.device
    session = _Session(log, report, run, plan)
    speed = _Speed(plan)
    if training.compile:
        print("compiling    once per machine and shape; the first step takes about a minute …", flush=True)
    with tqdm(total=training.max_steps, initial=first, desc="training", unit="step") as bar:
        for number in range(first + 1, training.max_steps + 1):
            batch, position = next_batch(data.train, position, training.sequences_per_step, shuffle=run.data.shuffle)
            state, metrics = step(state, fn.Batch(*(x.to(device, non_blocking=True) for x in batch)))
            last = number == training.max_steps
            saved = last or number % training.save_steps == 0
            evaluated = last or number == 1 or number % training.eval_steps == 0
            drawn = False
            if evaluated or saved or number % training.logging_steps == 0:
                tokens = seen + number * plan.tokens_per_step
                record = _record(number, tokens, metrics) | speed.read(number)
                if evaluated:
                    record["eval/loss"] = evaluate(state, run, data)
                _require_finite(record)
                drawn = session.write(record)
                bar.set_postfix_str(_postfix(record), refresh=False)
            bar.update()
            if saved:
                save(run, state, position, data, seen + number * plan.tokens_per_step)
            if evaluated or saved or drawn or number == first + 1:
                # None of these, nor the first step, which compiles, says anything about speed.
                speed.restart(number)
    if first < training.max_steps:
        session.draw()
    return state


def evaluate(state: TrainState, run: RunConfig, data: Prepared) -> float | None:
    """Mean loss in nats over the held-out batches, the same ones every time; None where nothing is held out."""
    if data.evaluation.total < 1:
        return None
    training, config = run.training, run.model
    params = cast(state.params, config, COMPUTE_DTYPE[training.mixed_precision])
    device = params.norm.weight.device
    total, counted = torch.zeros((), device=device), 0
    with torch.no_grad():
        for batch in eval_batches(data.evaluation, training.batch_size, training.eval_batches):
            logits = fn.forward(params, batch.tokens.to(device), config)
            total += fn.token_loss_sum(logits, batch.targets.to(device))
            counted += int(fn.count_targets(batch.targets))
    return total.item() / max(counted, 1)


def save(run: RunConfig, state: TrainState, position: Position, data: Prepared, tokens: int) -> Path:
    """Write a checkpoint of everything that a resumed run needs."""

    def extras(folder: Path) -> None:
        write_config(run, folder / CONFIG_FILE)
        data.tokenizer.save_pretrained(folder)

    trainer_state = {
        "step": int(state.step),
        "tokens": tokens,
        "position": position._asdict(),
        "data": data.fingerprint,
        "torch_version": torch.__version__,
    }
    return save_run(
        Path(run.output_dir) / CHECKPOINTS,
        state.params,
        run.model,
        state.optimizer,
        trainer_state,
        keep=run.training.save_total_limit,
        extras=extras,
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
        self.log.write(record)
        self.report(record)
        due = time.monotonic() - self.drawn > SECONDS_BETWEEN_PICTURES
        if due:
            self.draw()
        return due

    def draw(self) -> None:
        draw_curves(self.log.records, self.picture, self.title)
        self.drawn = time.monotonic()


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
    values = torch.stack([value.detach().double().cpu() for value in metrics.values()]).tolist()
    named = {names.get(key, key): value for key, value in zip(metrics, values, strict=True)}
    return {"step": number, "tokens": tokens, **named}


def _postfix(record: dict[str, Any]) -> str:
    shown = [f"loss {record['train/loss']:.3f}"]
    if record.get("eval/loss") is not None:
        shown.append(f"eval {record['eval/loss']:.3f}")
    if "tokens_per_sec" in record:
        shown.append(f"{record['tokens_per_sec']:,.0f} tokens/s")
    return ", ".join(shown)


def _require_finite(record: dict[str, Any]) -> None:
    losses = (record["train/loss"], record["grad_norm"], record.get("eval/loss") or 0.0)
    if not all(map(math.isfinite, losses)):
        raise ValueError(
            f"the loss or gradient is not finite at step {record['step']} (loss {record['train/loss']}, gradient norm "
            f"{record['grad_norm']}); lower training.optimizer.lr or lengthen training.scheduler.warmup_steps, "
            "and start again from the last checkpoint"
        )
