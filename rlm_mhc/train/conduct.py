"""What every recipe that trains does alike: it starts, says what it will do, trains, and says what came of it."""

import contextlib
import dataclasses
import functools
import io
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import torch

from rlm_mhc.checkpoint import checkpoints
from rlm_mhc.data import Prepared
from rlm_mhc.parallel import (
    Ranks,
    all_reduce,
    checksum,
    code_version,
    find_ranks,
    gather,
    process_group,
    require_agreement,
    watch_ranks,
)
from rlm_mhc.program import make_train_step
from rlm_mhc.program.parametrization import Parametrization
from rlm_mhc.program.step import TrainStep
from rlm_mhc.train.device import check_compiler, pick_device
from rlm_mhc.train.kernels import pick_kernels
from rlm_mhc.train.log import MetricsLog
from rlm_mhc.train.loop import train
from rlm_mhc.train.outlets import visible
from rlm_mhc.train.output import CHECKPOINTS, METRICS_FILE, begin_output
from rlm_mhc.train.plan import Plan, epoch_lines, make_plan
from rlm_mhc.train.run_config import RunConfig
from rlm_mhc.train.signals import watch_signals
from rlm_mhc.train.start import Start
from rlm_mhc.train.text import sample_text
from rlm_mhc.train.wandb_run import report_to, require_wandb, start_wandb


@contextlib.contextmanager
def launched(run: RunConfig) -> Iterator[tuple[torch.device, Ranks]]:
    """The device and the ranks of this process, alone or as one of those that torchrun or srun started; only the first
    rank's prints are seen."""
    device = pick_device(run.device)
    ranks = find_ranks()
    quiet = contextlib.redirect_stdout(sys.stdout if ranks.is_first else io.StringIO())
    with watch_ranks(ranks), process_group(ranks, device), quiet:
        yield device, ranks


def announce(run: RunConfig, device: torch.device, ranks: Ranks) -> Plan:
    """Check what the run needs, and print its plan.

    Raises:
        ValueError: when a library, a compiler or memory is missing.
    """
    check_compiler(device, run.training.compile)
    if ranks.is_first:
        require_wandb(run.training.wandb)
    kernels = pick_kernels(run.model, run.training, device, functools.partial(gather, ranks))
    plan = make_plan(run.model, run.training, run.data.max_length, device, ranks.world, run.adapters, kernels)
    print(*plan.lines, sep="\n", flush=True)
    plan.require_memory()
    return plan


def conduct(
    run: RunConfig,
    start: Start,
    data: Prepared,
    plan: Plan,
    ranks: Ranks,
    checkpoint: Path | None,
) -> None:
    """Train from a start to the end, or to the signal that asks for it, and print what came of it.

    Args:
        run: the whole config.
        start: of `starting_point`.
        data: what to train and evaluate on.
        plan: of `announce`.
        ranks: of `launched`.
        checkpoint: the one that the run goes on from, if any.

    Raises:
        ValueError: when ranks differ in what they are to train, or as `train` has it.
        OSError: as `train` has it.
    """
    facts = {"config": repr(run), "code": code_version(), "data": data.fingerprint, **start.method.facts}
    require_agreement(ranks, lambda: {**facts, "state": checksum(start.state)})
    print(*epoch_lines(run.training, data.train.total, ranks.world), sep="\n", flush=True)
    step = _make_step(run, plan, start.method.parametrization, ranks)
    if not ranks.is_first:
        with watch_signals(ranks) as signals:
            train(run, start, step, data, plan, ranks=ranks, signals=signals)
        return
    folder = begin_output(run, checkpoint)
    wandb_run = start_wandb(run.training.wandb, folder, dataclasses.asdict(run), resume=run.resume == "auto")
    log = MetricsLog(folder / METRICS_FILE, int(start.state.step))
    if start.state.step >= run.training.max_steps:
        print(f"nothing left: training.max_steps={run.training.max_steps} are done", flush=True)
    with watch_signals(ranks) as signals:
        state = train(run, start, step, data, plan, log, report=report_to(wandb_run), ranks=ranks, signals=signals)
    if wandb_run:
        wandb_run.finish()
    found = checkpoints(folder / CHECKPOINTS)
    newest = found[-1] if found else checkpoint
    if state.step < run.training.max_steps:
        print(
            f"stopped      after step {int(state.step)}, saved as {newest}; the same command with resume=auto goes on"
        )
        return
    losses = [r["eval/loss"] for r in log.records if r.get("eval/loss") is not None]
    if losses:
        print(f"eval loss    {losses[0]:.3f} at the start, {losses[-1]:.3f} now")
    params = start.method.model_of(state.params)
    text = sample_text(params, run.model, data.tokenizer, "The", seed=run.seed, turn_ends=data.turn_ends)
    print("sample text:\n" + textwrap.indent(visible(text), "    "))
    print(f"written to   {folder} (curves.png, metrics.jsonl); newest checkpoint: {newest}")


def _make_step(run: RunConfig, plan: Plan, parametrization: Parametrization | None, ranks: Ranks) -> TrainStep:
    return make_train_step(
        run.model,
        run.training,
        reduce=all_reduce if ranks.world > 1 else None,
        kernels=plan.kernels,
        donate=True,
        announce=lambda number, of, name: print(f"compiling    {number}/{of}: {name} …", flush=True),
        parametrization=parametrization,
    )
