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
from rlm_mhc.checkpoint import save_run
from rlm_mhc.data import Position, Prepared, eval_batches, next_batch
from rlm_mhc.params import cast
from rlm_mhc.program.state import TrainState
from rlm_mhc.program.step import COMPUTE_DTYPE, TrainStep
from rlm_mhc.train.curves import draw_curves
from rlm_mhc.train.log import MetricsLog
from rlm_mhc.train.output import CHECKPOINTS, CONFIG_FILE, CURVES_FILE, write_config
from rlm_mhc.train.plan import Plan
from rlm_mhc.train.run_config import RunConfig

SECONDS_BETWEEN_PICTURES = 15.0


def train(
    run: RunConfig,
    state: TrainState,
    position: Position,
    step: TrainStep,
    data: Prepared,
    plan: Plan,
    log: MetricsLog,
    report: Callable[[dict[str, Any]], object] = lambda record: None,
) -> TrainState:
    """Update `state` until `max_steps`, logging, evaluating, drawing and saving on the way.

    Args:
        run: the whole config.
        state: where to start; with a donating `step` it must not be used afterwards.
        position: of the next sequence in the data.
        step: of `make_train_step`.
        data: what to train and evaluate on.
        plan: of `make_plan`, for tokens and operations per step.
        log: receives one record per logged step.
        report: receives the same records, for wandb and the like.

    Raises:
        ValueError: when the loss is no longer finite.
    """
    training, folder = run.training, Path(run.output_dir)
    start, device = int(state.step), state.params.norm.weight.device
    session = _Session(log, report, folder / CURVES_FILE, f"{folder.name}: {plan.params:,} parameters")
    if not start:
        session.write({"step": 0, "tokens": 0, "eval/loss": evaluate(state, run, data)})
    if training.compile:
        print("compiling    once per machine and shape; the first step takes about a minute …", flush=True)
    bar = tqdm(range(start, training.max_steps), initial=start, total=training.max_steps, desc="training", unit="step")
    since, counted = time.perf_counter(), start
    for done in bar:
        batch, position = next_batch(data.train, position, training.sequences_per_step, shuffle=run.data.shuffle)
        state, metrics = step(state, fn.Batch(*(x.to(device, non_blocking=True) for x in batch)))
        number = done + 1
        last = number == training.max_steps
        if number == start + 1:
            # The first step compiles; it says nothing about speed.
            metrics["loss"].item()
            since, counted = time.perf_counter(), number
        if number % training.logging_steps == 0 or last or number == 1:
            record = _record(number, metrics, plan)
            elapsed = time.perf_counter() - since
            if number > counted:
                speed = (number - counted) * plan.tokens_per_step / elapsed
                flops = speed * plan.flops_per_step / plan.tokens_per_step
                record |= {"tokens_per_sec": speed, "mfu": flops / plan.peak_rate}
                since, counted = time.perf_counter(), number
            if number % training.eval_steps == 0 or last:
                record["eval/loss"] = evaluate(state, run, data)
                since = time.perf_counter()
            bar.set_postfix_str(_postfix(record))
            session.write(record)
            _require_finite(record)
        elif number % training.eval_steps == 0:
            session.write({"step": number, "eval/loss": evaluate(state, run, data)})
        if number % training.save_steps == 0 or last:
            save(run, state, position, data.tokenizer, number * plan.tokens_per_step)
            since, counted = time.perf_counter(), number
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


def save(run: RunConfig, state: TrainState, position: Position, tokenizer: Any, tokens: int) -> Path:
    """Write a checkpoint of everything that a resumed run needs."""

    def extras(folder: Path) -> None:
        write_config(run, folder / CONFIG_FILE)
        tokenizer.save_pretrained(folder)

    trainer_state = {
        "step": int(state.step),
        "tokens": tokens,
        "position": position._asdict(),
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

    def __init__(self, log: MetricsLog, report: Callable, picture: Path, title: str) -> None:
        self.log, self.report, self.picture, self.title = log, report, picture, title
        self.drawn = -math.inf

    def write(self, record: dict[str, Any]) -> None:
        self.log.write(record)
        self.report(record)
        if time.monotonic() - self.drawn > SECONDS_BETWEEN_PICTURES:
            self.draw()

    def draw(self) -> None:
        draw_curves(self.log.records, self.picture, self.title)
        self.drawn = time.monotonic()


def _record(number: int, metrics: dict[str, Tensor], plan: Plan) -> dict[str, Any]:
    names = {"loss": "train/loss", "lr": "train/lr"}
    values = torch.stack([value.detach().double().cpu() for value in metrics.values()]).tolist()
    named = {names.get(key, key): value for key, value in zip(metrics, values, strict=True)}
    return {"step": number, "tokens": number * plan.tokens_per_step, **named}


def _postfix(record: dict[str, Any]) -> str:
    shown = [f"loss {record['train/loss']:.3f}"]
    if record.get("eval/loss") is not None:
        shown.append(f"eval {record['eval/loss']:.3f}")
    if "tokens_per_sec" in record:
        shown.append(f"{record['tokens_per_sec']:,.0f} tokens/s")
    return ", ".join(shown)


def _require_finite(record: dict[str, Any]) -> None:
    if not (math.isfinite(record["train/loss"]) and math.isfinite(record["grad_norm"])):
        sys.stdout.flush()
        raise ValueError(
            f"the loss or gradient is not finite at step {record['step']} (loss {record['train/loss']}, gradient norm "
            f"{record['grad_norm']}); lower training.optimizer.lr or lengthen training.scheduler.warmup_steps, "
            "and start again from the last checkpoint"
        )
