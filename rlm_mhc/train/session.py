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
from rlm_mhc.params import cast
from rlm_mhc.program import make_decoder, make_program
from rlm_mhc.program.precision import COMPUTE_DTYPE
from rlm_mhc.program.step import Program
from rlm_mhc.program.weight_source import WeightSource
from rlm_mhc.train.device import check_compiler, pick_device
from rlm_mhc.train.kernels import pick_kernels
from rlm_mhc.train.log import MetricsLog
from rlm_mhc.train.loop import train
from rlm_mhc.train.output import CHECKPOINTS, METRICS_FILE, begin_output
from rlm_mhc.train.plan import Plan, epoch_lines, make_plan
from rlm_mhc.train.run_config import RunConfig
from rlm_mhc.train.safe_stream import visible
from rlm_mhc.train.signals import watch_signals
from rlm_mhc.train.start import Start
from rlm_mhc.train.text import sample_text
from rlm_mhc.train.wandb_run import finished, report_to, require_wandb, start_wandb


@contextlib.contextmanager
def distributed_session(run: RunConfig) -> Iterator[tuple[torch.device, Ranks]]:
    """The device and the ranks of this process, alone or as one of those that torchrun or srun started; only the first
    rank's prints are seen."""
    device = pick_device(run.device)
    ranks = find_ranks()
    quiet = contextlib.redirect_stdout(sys.stdout if ranks.is_first else io.StringIO())
    with watch_ranks(ranks), process_group(ranks, device), quiet:
        yield device, ranks


def print_plan(run: RunConfig, device: torch.device, ranks: Ranks) -> Plan:
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


def run_training(
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
        start: of `initial_state`.
        data: what to train and evaluate on.
        plan: of `print_plan`.
        ranks: of `distributed_session`.
        checkpoint: the one that the run goes on from, if any.

    Raises:
        ValueError: when ranks differ in what they are to train, or as `train` has it.
        OSError: as `train` has it.
    """
    facts = {"config": repr(run), "code": code_version(), "data": data.fingerprint, **start.trainable.facts}
    require_agreement(ranks, lambda: {**facts, "state": checksum(start.state)})
    print(*epoch_lines(run.training, data.train.total, ranks.world), sep="\n", flush=True)
    program = _make_program(run, plan, start.trainable.weight_source, ranks, evaluates=data.evaluation.total > 0)
    if not ranks.is_first:
        with watch_signals(ranks) as signals:
            train(run, start, program, data, plan, ranks=ranks, signals=signals)
        return
    folder = begin_output(run, checkpoint)
    wandb_run = start_wandb(run.training.wandb, folder, dataclasses.asdict(run), resume=run.resume == "auto")
    log = MetricsLog(folder / METRICS_FILE, int(start.state.step))
    if start.state.step >= run.training.max_steps:
        print(f"nothing left: training.max_steps={run.training.max_steps} are done", flush=True)
    with finished(wandb_run), watch_signals(ranks) as signals:
        state = train(run, start, program, data, plan, log, report=report_to(wandb_run), ranks=ranks, signals=signals)
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
    params = cast(start.trainable.model_of(state.params), run.model, COMPUTE_DTYPE[run.training.mixed_precision])
    decoder = make_decoder(run.model, kernels=plan.kernels, compiled=False)  # compiling takes longer than one sample
    text = sample_text(
        params,
        run.model,
        data.tokenizer,
        "The",
        seed=run.seed,
        stop_token_ids=data.stop_token_ids,
        decoder=decoder,
    )
    print("sample text:\n" + textwrap.indent(visible(text), "    "))
    print(f"written to   {folder} (curves.png, metrics.jsonl); newest checkpoint: {newest}")


def _make_program(
    run: RunConfig, plan: Plan, weight_source: WeightSource | None, ranks: Ranks, evaluates: bool
) -> Program:
    return make_program(
        run.model,
        run.training,
        reduce=all_reduce if ranks.world > 1 else None,
        kernels=plan.kernels,
        donate=True,
        on_compile=lambda number, of, name: print(f"compiling    {number}/{of}: {name} …", flush=True),
        weight_source=weight_source,
        evaluates=evaluates,
    )
