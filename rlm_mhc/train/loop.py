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
from rlm_mhc.parallel import Ranks, sum_over_ranks
from rlm_mhc.params import cast
from rlm_mhc.program.head import chunk_tokens, chunks
from rlm_mhc.program.precision import COMPUTE_DTYPE
from rlm_mhc.program.state import TrainState
from rlm_mhc.program.step import TrainStep
from rlm_mhc.train.curves import draw_curves
from rlm_mhc.train.log import MetricsLog, by_layer
from rlm_mhc.train.output import CHECKPOINTS, CONFIG_FILE, CURVES_FILE, write_config
from rlm_mhc.train.plan import Plan
from rlm_mhc.train.run_config import RunConfig
from rlm_mhc.train.start import Start

SECONDS_BETWEEN_PICTURES = 15.0
ALONE = Ranks()
SMALLEST_LOSS_SCALE = 2.0**-10


def train(
    run: RunConfig,
    start: Start,
    step: TrainStep,
    data: Prepared,
    plan: Plan,
    log: MetricsLog | None = None,
    report: Callable[[dict[str, Any]], object] = lambda record: None,
    ranks: Ranks = ALONE,
) -> TrainState:
    """Update `state` until `max_steps`, logging, evaluating, drawing and saving on the way.

    Args:
        run: the whole config.
        start: where to start; with a donating `step` its state must not be used afterwards.
        step: of `make_train_step`.
        data: what to train and evaluate on.
        plan: of `make_plan`, for tokens and operations per step.
        log: receives one record per logged step; None on the ranks that do not write.
        report: receives the same records, for wandb and the like.
        ranks: who takes part; only the first logs, draws and saves.

    Raises:
        ValueError: when the loss is no longer finite.
    """
    training, (state, position, seen) = run.training, start
    first, skipped = int(state.step), torch.zeros((), device=state.step.device)
    seen -= first * plan.tokens_per_step
    device = state.params.norm.weight.device
    session = _Session(log, report, run, plan) if log is not None else None
    warn_of_mhc = _HealthWarning(run) if ranks.is_first else lambda record: None
    speed = _Speed(plan)
    with _bar(training.max_steps, first, ranks) as bar:
        for number in range(first + 1, training.max_steps + 1):
            batch, position = next_batch(
                data.train,
                position,
                training.sequences_per_step,
                shuffle=run.data.shuffle,
                rank=ranks.rank,
                world=ranks.world,
            )
            state, metrics = step(state, fn.Batch(*(x.to(device, non_blocking=True) for x in batch)))
            if "skipped" in metrics:
                skipped = skipped + metrics["skipped"]
            last = number == training.max_steps
            saved = last or number % training.save_steps == 0
            evaluated = last or number == 1 or number % training.eval_steps == 0
            drawn = False
            if evaluated or saved or number % training.logging_steps == 0:
                record = _record(number, seen + number * plan.tokens_per_step, metrics) | speed.read(number)
                if "skipped" in metrics:
                    _report_skipped(record, int(skipped))
                    skipped = torch.zeros_like(skipped)
                if evaluated:
                    record["eval/loss"] = evaluate(state, run, data, ranks)
                _require_finite(record)
                drawn = session.write(record) if session else False
                warn_of_mhc(record)
                bar.set_postfix_str(_postfix(record), refresh=False)
            bar.update()
            if saved and ranks.is_first:
                save(run, state, position, data, seen + number * plan.tokens_per_step)
            if evaluated or saved or drawn or number == first + 1:
                # None of these, nor the first step, which compiles, says anything about speed.
                speed.restart(number)
    if session and first < training.max_steps:
        session.draw()
    return state


def evaluate(state: TrainState, run: RunConfig, data: Prepared, ranks: Ranks = ALONE) -> float | None:
    """Mean loss in nats over the held-out batches, the same ones every time; None where nothing is held out.

    Each rank takes its share of the batches.
    """
    if data.evaluation.total < 1:
        return None
    training, config = run.training, run.model
    params = cast(state.params, config, COMPUTE_DTYPE[training.mixed_precision])
    device = params.norm.weight.device
    sums = torch.zeros(2, device=device, dtype=torch.float32)
    with torch.no_grad():
        for number, batch in enumerate(eval_batches(data.evaluation, training.batch_size, training.eval_batches)):
            if number % ranks.world != ranks.rank:
                continue
            hidden = fn.backbone(params, batch.tokens.to(device), config).hidden
            targets = batch.targets.flatten().to(device)
            size = chunk_tokens(len(targets), config.vocab_size, device.type)
            for rows, wanted in zip(chunks(hidden, size), targets.split(size), strict=True):
                sums[0] += fn.token_loss_sum(fn.head(params, rows, config), wanted)
            sums[1] += fn.count_targets(targets)
    total, counted = sum_over_ranks(sums, ranks).tolist()
    return total / max(counted, 1)


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
    if state.loss_scale:
        trainer_state["loss_scale"] = {name: value.item() for name, value in state.loss_scale._asdict().items()}
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
        self.log.write(by_layer(record))
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
    values = torch.stack([value.detach().double() for value in metrics.values()]).tolist()  # one wait for all of them
    named = {names.get(key, key): value for key, value in zip(metrics, values, strict=True)}
    return {"step": number, "tokens": tokens, **named}


class _HealthWarning:
    """Says once that the residual mappings amplify more than they should, and what to do."""

    def __init__(self, run: RunConfig) -> None:
        self.target, self.preset, self.said = run.mhc.target_amax, run.model.mhc_preset, False

    def __call__(self, record: dict[str, Any]) -> None:
        watched = {name: record[f"mhc/{name}"] for name in ("amax_pre", "amax_post", "gain_forward", "gain_backward")}
        name, value = max(watched.items(), key=lambda item: item[1])
        if self.said or value <= self.target:
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


def _report_skipped(record: dict[str, Any], skipped: int) -> None:
    """Turn the record's `skipped` from that of its own step into that of all steps since the last record, and say so.

    What a skipped step computed is no number to keep.

    Raises:
        ValueError: when the loss scale has become so small that it is not what is wrong.
    """
    if record["skipped"]:
        record |= {"train/loss": None, "grad_norm": None}
        if record["loss_scale"] < SMALLEST_LOSS_SCALE:
            raise ValueError(
                f"no gradient is finite at step {record['step']}, even at loss scale {record['loss_scale']:g}; lower "
                "training.optimizer.lr, or use training.mixed_precision=bf16"
            )
    record["skipped"] = skipped
    if skipped:
        tqdm.write(
            f"step {record['step']}: {skipped} steps skipped since the last line, for gradients that were not finite; "
            f"the loss scale is {record['loss_scale']:g}"
        )


def _require_finite(record: dict[str, Any]) -> None:
    values = [record[name] for name in ("train/loss", "grad_norm", "eval/loss") if record.get(name) is not None]
    if not all(map(math.isfinite, values)):
        raise ValueError(
            f"the loss or gradient is not finite at step {record['step']} (loss {record['train/loss']}, gradient norm "
            f"{record['grad_norm']}); lower training.optimizer.lr or lengthen training.scheduler.warmup_steps, "
            "and start again from the last checkpoint"
        )
