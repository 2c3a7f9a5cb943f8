"""Train a language model from text: `python recipes/pretrain_1b.py [key=value …]`; keys in configs/pretrain_1b.yaml."""

import dataclasses
import textwrap

from rlm_mhc.checkpoint import load_run
from rlm_mhc.data import Position, prepare
from rlm_mhc.fn import adamw_init
from rlm_mhc.program import init_train_state, make_train_step
from rlm_mhc.program.state import resume_train_state
from rlm_mhc.train import RunConfig, command, make_plan, open_output, pick_device, train
from rlm_mhc.train.device import check_compiler
from rlm_mhc.train.log import MetricsLog, report_to, start_wandb
from rlm_mhc.train.output import METRICS_FILE, begin_output
from rlm_mhc.train.text import sample_text


def main(run: RunConfig) -> None:
    """One run, from the first line of the plan to the last checkpoint."""
    device = pick_device(run.device)
    check_compiler(device, run.training.compile)
    source, eval_source = run.data.sources()

    plan = make_plan(run.model, run.training, run.data.max_length, device)
    print(*plan.lines, sep="\n", flush=True)
    plan.require_memory()

    checkpoint = open_output(run)
    print(f"data         {source.name}", flush=True)
    data = prepare(
        run.token_folder,
        source,
        eval_source,
        tokenizer=run.data.tokenizer,
        vocab_size=run.model.vocab_size,
        max_length=run.data.max_length,
    )
    if data.evaluation.total == 0:
        print("eval         nothing could be held out of so little text; no eval/loss", flush=True)

    position = Position(run.seed)
    if checkpoint is None:
        state = init_train_state(run.model, run.training, seed=run.seed, device=device)
    else:
        saved = load_run(checkpoint, adamw_init, device)
        if saved.config != run.model:
            raise ValueError(f"{checkpoint}: a model of another shape than model.*; use the same model keys")
        state = resume_train_state(saved.params, saved.optimizer, saved.trainer_state["step"])
        position = Position(**saved.trainer_state["position"])
        print(f"resumed      {checkpoint}, step {int(state.step)}", flush=True)

    folder = begin_output(run, resumed=checkpoint is not None)
    wandb_run = start_wandb(run.training.wandb, folder, dataclasses.asdict(run))
    log = MetricsLog(folder / METRICS_FILE, int(state.step))
    step = make_train_step(run.model, run.training, donate=True)
    state = train(run, state, position, step, data, plan, log, report=report_to(wandb_run))
    log.close()
    if wandb_run:
        wandb_run.finish()

    losses = [r["eval/loss"] for r in log.records if r.get("eval/loss") is not None]
    if losses:
        print(f"eval loss    {losses[0]:.3f} at the start, {losses[-1]:.3f} now")
    print(
        "sample text:\n"
        + textwrap.indent(sample_text(state.params, run.model, data.tokenizer, "The", seed=run.seed), "    ")
    )
    print(f"written to   {folder} (curves.png, metrics.jsonl, checkpoints/checkpoint-{int(state.step)})")


if __name__ == "__main__":
    command(RunConfig, __file__, main)
