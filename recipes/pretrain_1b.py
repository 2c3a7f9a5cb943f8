"""Train a language model from text: `python recipes/pretrain_1b.py [key=value …]`; keys in configs/pretrain_1b.yaml.

On several GPUs: `torchrun --nproc-per-node=8 recipes/pretrain_1b.py [key=value …]`.
"""

import contextlib
import dataclasses
import io
import sys
import textwrap

import torch

from rlm_mhc.checkpoint import checkpoints
from rlm_mhc.data import prepare
from rlm_mhc.parallel import (
    Ranks,
    all_reduce,
    checksum,
    code_version,
    find_ranks,
    first_before_others,
    from_first,
    process_group,
    require_agreement,
    watch_ranks,
)
from rlm_mhc.program import make_train_step
from rlm_mhc.train import RunConfig, command, make_plan, open_output, pick_device, train
from rlm_mhc.train.device import check_compiler
from rlm_mhc.train.kernels import pick_kernels
from rlm_mhc.train.log import MetricsLog, report_to, require_wandb, start_wandb
from rlm_mhc.train.output import CHECKPOINTS, METRICS_FILE, begin_output
from rlm_mhc.train.signals import watch_signals
from rlm_mhc.train.start import starting_point
from rlm_mhc.train.text import sample_text


def main(run: RunConfig) -> None:
    """One run, alone or as one of the processes that torchrun started."""
    device = pick_device(run.device)
    ranks = find_ranks()
    quiet = contextlib.redirect_stdout(sys.stdout if ranks.is_first else io.StringIO())
    with watch_ranks(ranks), process_group(ranks, device), quiet:
        pretrain(run, device, ranks)


def pretrain(run: RunConfig, device: torch.device, ranks: Ranks) -> None:
    """From the first line of the plan to the last checkpoint."""
    check_compiler(device, run.training.compile)
    require_wandb(run.training.wandb)
    kernels = pick_kernels(run.model, run.training, device)
    source, eval_source = run.data.sources()

    plan = make_plan(run.model, run.training, run.data.max_length, device, ranks.world)
    print(*plan.lines, sep="\n", flush=True)
    plan.require_memory()

    checkpoint = from_first(ranks, lambda: open_output(run))
    # A tokenizer trained anew on other data would give the same ids to other words.
    tokenizer = str(checkpoint) if checkpoint and run.data.tokenizer == "auto" else run.data.tokenizer
    print(f"data         {source.name}", flush=True)
    with first_before_others(ranks):
        data = prepare(
            run.token_folder,
            source,
            eval_source,
            tokenizer=tokenizer,
            vocab_size=run.model.vocab_size,
            max_length=run.data.max_length,
            strict=run.data.strict,
            max_bad_fraction=run.data.max_bad_fraction,
        )
    start = starting_point(run, checkpoint, data, device, ranks)
    require_agreement(
        ranks,
        lambda: {
            "config": repr(run),
            "code": code_version(),
            "data": data.fingerprint,
            "state": checksum(start.state),
        },
    )

    step = make_train_step(
        run.model,
        run.training,
        reduce=all_reduce if ranks.world > 1 else None,
        kernels=kernels,
        donate=True,
        announce=lambda number, of, name: print(f"compiling    {number}/{of}: {name} …", flush=True),
    )
    if not ranks.is_first:
        with watch_signals(ranks) as signals:
            train(run, start, step, data, plan, ranks=ranks, signals=signals)
        return

    folder = begin_output(run, checkpoint)
    wandb_run = start_wandb(run.training.wandb, folder, dataclasses.asdict(run))
    log = MetricsLog(folder / METRICS_FILE, int(start.state.step))
    if start.state.step >= run.training.max_steps:
        print(f"nothing left: training.max_steps={run.training.max_steps} are done", flush=True)
    with watch_signals(ranks) as signals:
        state = train(run, start, step, data, plan, log, report=report_to(wandb_run), ranks=ranks, signals=signals)
    if wandb_run:
        wandb_run.finish()
    newest = (checkpoints(folder / CHECKPOINTS) or [checkpoint])[-1]
    if state.step < run.training.max_steps:
        print(
            f"stopped      after step {int(state.step)}, saved as {newest}; the same command with resume=auto goes on"
        )
        return

    losses = [r["eval/loss"] for r in log.records if r.get("eval/loss") is not None]
    if losses:
        print(f"eval loss    {losses[0]:.3f} at the start, {losses[-1]:.3f} now")
    text = sample_text(state.params, run.model, data.tokenizer, "The", seed=run.seed)
    print("sample text:\n" + textwrap.indent(text, "    "))
    print(f"written to   {folder} (curves.png, metrics.jsonl); newest checkpoint: {newest}")


if __name__ == "__main__":
    command(RunConfig, __file__, main)
