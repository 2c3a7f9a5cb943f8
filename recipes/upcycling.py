"""A Llama and the mHC model made of it, fine-tuned side by side: `python recipes/upcycling.py [key=value …]`; keys in
configs/upcycling.yaml.

A randomly initialised Llama is saved by transformers, turned into an mHC model by `rlm_mhc.convert.upcycle`, and that
is fine-tuned by `recipes/finetune.py`. The Llama itself is trained by plain autograd and torch's AdamW on the same
batches at the same rates. Prints a table and writes it as JSON, with a picture.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from rlm_mhc import ModelConfig, fn
from rlm_mhc.convert import upcycle
from rlm_mhc.data import Position, Prepared, builtin_source, eval_batches, jsonl_source, next_batch, prepare
from rlm_mhc.disk import text_lines
from rlm_mhc.testing.baselines import llama
from rlm_mhc.testing.measure import provenance, write_result
from rlm_mhc.train import command
from rlm_mhc.train.curves import label_axes, new_figure, save_figure
from rlm_mhc.validation import at_least, check, location, positive

FINETUNE = Path(__file__).with_name("finetune.py")
BETAS, EPS, CLIP, MIN_LR = (0.9, 0.95), 1e-8, 1.0, 0.1
COLOURS = {"llama": "#f4a582", "mhc": "#2166ac"}
WIDTHS = {"llama": 5.0, "mhc": 1.4}  # the two may lie on one another


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpcyclingConfig:
    """The Llama, and how long both are trained."""

    layers: int = at_least(1, 4)
    width: int = at_least(1, 128)
    num_heads: int = at_least(1, 4)
    mhc_flows: int = at_least(2, 4)
    vocab_size: int = at_least(257, 4096)
    length: int = at_least(1, 128)
    batch_size: int = at_least(1, 8)
    steps: int = at_least(2, 50)
    lr: float = positive(3e-3)
    warmup: int = at_least(0, 10)
    eval_batches: int = at_least(1, 16)
    seed: int = at_least(0, 42)
    train_path: str | None = location(None)
    compile: bool = False
    work_dir: str = location("outputs/upcycling")
    output_dir: str = location("recipes/results")
    debug: bool = False

    def __post_init__(self) -> None:
        check(self)


def save_llama(run: UpcyclingConfig, folder: Path) -> Any:
    """A Llama with transformers' own initial weights, saved by transformers."""
    shape = dict(hidden_dim=run.width, num_layers=run.layers, num_heads=run.num_heads, vocab_size=run.vocab_size)
    torch.manual_seed(run.seed)
    model = llama(ModelConfig(**shape, max_seq_len=run.length, mhc_enabled=False))
    model.save_pretrained(folder)
    return model


def train_llama(run: UpcyclingConfig, model: Any, data: Prepared) -> list[dict[str, float]]:
    """One record per step, as `finetune.py` writes them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr, betas=BETAS, eps=EPS, weight_decay=0.0)
    position, records = Position(run.seed), [{"step": 0, "eval/loss": held_out_loss(run, model, data)}]
    for step in range(run.steps):
        batch, position = next_batch(data.train, position, run.batch_size)
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        rate = fn.cosine_schedule(step, lr=run.lr, warmup_steps=run.warmup, max_steps=run.steps, min_lr_ratio=MIN_LR)
        optimizer.param_groups[0]["lr"] = float(rate)
        optimizer.step()
        optimizer.zero_grad()
        records.append({"step": step + 1, "train/loss": loss.item()})
    records[-1]["eval/loss"] = held_out_loss(run, model, data)
    return records


def loss_of(model: Any, batch: fn.Batch) -> torch.Tensor:
    """transformers' logits, and the mean over counted targets."""
    return F.cross_entropy(model(batch.tokens).logits.flatten(0, 1), batch.targets.flatten())


@torch.no_grad()
def held_out_loss(run: UpcyclingConfig, model: Any, data: Prepared) -> float:
    """The mean over the batches that `finetune.py` evaluates on."""
    total = counted = 0.0
    for batch in eval_batches(data.evaluation, run.batch_size, run.eval_batches):
        count = float(fn.count_targets(batch.targets))
        total, counted = total + count * loss_of(model, batch).item(), counted + count
    return total / counted


def finetune(run: UpcyclingConfig, checkpoint: Path, tokens: Path, work: Path) -> list[dict[str, float]]:
    """The records of `finetune.py` on a checkpoint.

    Raises:
        ValueError: with its last line, where it fails.
    """
    keys = {
        "checkpoint": checkpoint,
        "output_dir": work / "finetune",
        "overwrite": "true",
        "device": "cpu",
        "seed": run.seed,
        "data.train_path": run.train_path or "null",
        "data.tokenizer": tokens / "tokenizer",
        "data.cache_dir": tokens,
        "data.max_length": run.length,
        "training.optimizer.lr": run.lr,
        "training.scheduler.warmup_steps": run.warmup,
        "training.batch_size": run.batch_size,
        "training.gradient_accumulation_steps": 1,
        "training.max_steps": run.steps,
        "training.mixed_precision": "fp32",
        "training.logging_steps": 1,
        "training.eval_steps": run.steps,
        "training.eval_batches": run.eval_batches,
        "training.compile": str(run.compile).lower(),
    }
    arguments = [f"{key}={value}" for key, value in keys.items()]
    done = subprocess.run([sys.executable, str(FINETUNE), *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"finetune.py ended with code {done.returncode}; its own last line says why")
    metrics = work / "finetune" / "metrics.jsonl"
    return [json.loads(line) for line in text_lines(metrics.read_bytes(), str(metrics))]


def report(run: UpcyclingConfig, curves: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Everything measured, as JSON values."""
    held_out = {name: [r["eval/loss"] for r in records if r.get("eval/loss")] for name, records in curves.items()}
    start = {name: losses[0] for name, losses in held_out.items()}
    return {
        **provenance(torch.device("cpu"), ["torch", "transformers"]),
        "config": dataclasses.asdict(run),
        "held_out_before": start,
        "difference_before": abs(start["mhc"] - start["llama"]) / start["llama"],
        "held_out_after": {name: losses[-1] for name, losses in held_out.items()},
        "training_loss": {
            name: [r["train/loss"] for r in records if "train/loss" in r and r["step"] > 0]
            for name, records in curves.items()
        },
    }


def draw(result: dict[str, Any], file: Path) -> None:
    """Training loss of both over steps, with the held-out loss before and after."""
    figure = new_figure(8, 4.8)
    axes = figure.subplots()
    names = {"llama": "transformers' Llama", "mhc": "upcycled to mHC"}
    for name, losses in result["training_loss"].items():
        axes.plot(range(1, len(losses) + 1), losses, color=COLOURS[name], label=names[name], linewidth=WIDTHS[name])
        ends = [result["held_out_before"][name], result["held_out_after"][name]]
        marker = "o" if name == "llama" else "x"
        axes.plot([0, len(losses)], ends, marker, color=COLOURS[name], markersize=9, label=f"{names[name]}, held out")
    label_axes(axes, "loss of the same batches", "cross-entropy (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    config = result["config"]
    save_figure(
        figure, file, f"a random Llama, {config['layers']} layers of width {config['width']}, and what it became"
    )


def main(run: UpcyclingConfig) -> None:
    """Save, convert, train both, print, write, draw."""
    work, results = Path(run.work_dir), Path(run.output_dir)
    tokens = work / "tokens"
    source = jsonl_source(run.train_path, key="train_path") if run.train_path else builtin_source()
    data = prepare(tokens, source, None, tokenizer="auto", vocab_size=run.vocab_size, max_length=run.length)
    for name in ("llama", "mhc"):
        shutil.rmtree(work / name, ignore_errors=True)
    model = save_llama(run, work / "llama")
    upcycle(work / "llama", work / "mhc", mhc_flows=run.mhc_flows)
    curves = {"llama": train_llama(run, model, data), "mhc": finetune(run, work / "mhc", tokens, work)}
    result = report(run, curves)
    for name in curves:
        before, after = result["held_out_before"][name], result["held_out_after"][name]
        print(f"{name:<6} held-out loss {before:.8f} before the first step, {after:.4f} after {run.steps}")
    print(f"before the first step they differ by {result['difference_before']:.1e} of the loss")
    file = write_result(results, f"upcycling_{run.width}x{run.layers}.json", result)
    draw(result, results / "upcycling.png")
    print(f"written to {file} and upcycling.png beside it")


if __name__ == "__main__":
    command(UpcyclingConfig, __file__, main)
