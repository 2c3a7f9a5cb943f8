"""Decoding beside transformers' Llama with a static cache: `python recipes/benchmark.py decode [key=value …]`.

Both greedy, in fp32, their decode step compiled as one graph, from a loop that does nothing else. Prints a table and
writes it as JSON. Run it on an otherwise idle machine: tokens/s are medians of interleaved rounds, and ratios medians
of the ratios within a round.
"""

import dataclasses
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlm_mhc import ModelConfig, fn
from rlm_mhc.program import make_decoder
from rlm_mhc.testing.baselines import llama
from rlm_mhc.testing.measure import provenance, timed, write_result
from rlm_mhc.train import command, pick_device
from rlm_mhc.train.device import check_compiler
from rlm_mhc.tree import size_bytes, tree_map
from rlm_mhc.validation import at_least, check, location, one_of, section

OURS, PLAIN, PEER = "mHC", "no mHC", "transformers Llama, static cache"
Decode = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """What to measure."""

    model: ModelConfig = section(ModelConfig)
    batch_size: int = at_least(1, 1)
    prompt: int = at_least(1, 16)
    new_tokens: int = at_least(1, 100)
    cache_size: int = at_least(2, 256)
    rounds: int = at_least(1, 15)
    threads: int | None = at_least(1, None)
    device: str = one_of("auto", "cpu", "cuda")
    seed: int = at_least(0, 42)
    output_dir: str = location("recipes/results")
    debug: bool = False

    def __post_init__(self) -> None:
        check(self)
        if self.prompt + self.new_tokens > self.cache_size:
            raise ValueError(
                f"cache_size={self.cache_size}: no room for prompt={self.prompt} and new_tokens={self.new_tokens}"
            )


def ours(run: DecodeConfig, config: ModelConfig, prompts: Tensor) -> Callable[[], Decode]:
    """Our prefill; what it returns decodes."""
    shapes = fn.init(config, device="meta")
    # Drawn on the device: only time counts, and a billion weights take long to draw on a CPU.
    params = tree_map(lambda w: torch.empty_like(w, device=prompts.device).normal_(std=0.02), shapes)
    decoder = make_decoder(config, cache_size=run.cache_size)

    def start() -> Decode:
        empty = fn.init_cache(config, run.batch_size, run.cache_size, device=prompts.device)
        state = decoder.prefill(params, prompts, config, empty)

        def decode() -> Tensor:
            logits, cache = state
            for _ in range(run.new_tokens):
                logits, cache = decoder.extend(params, logits.argmax(-1, keepdim=True), config, cache)
            return logits

        return decode

    return start


def theirs(run: DecodeConfig, config: ModelConfig, prompts: Tensor) -> Callable[[], Decode]:
    """transformers' prefill into a static cache; what it returns decodes."""
    from transformers import StaticCache

    with prompts.device:
        model = llama(config).eval()
    model.config.use_cache = True
    step = torch.compile(model.forward, fullgraph=True, dynamic=False)

    def start() -> Decode:
        cache = StaticCache(config=model.config, max_cache_len=run.cache_size)
        # The cache by position: transformers 5.24 renamed the argument.
        read = model(prompts, None, None, cache, use_cache=True, logits_to_keep=1).logits

        def decode() -> Tensor:
            logits = read
            for _ in range(run.new_tokens):
                logits = step(logits[:, -1].argmax(-1, keepdim=True), None, None, cache, use_cache=True).logits
            return logits

        return decode

    return start


def measure(run: DecodeConfig, device: torch.device) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Tokens per second of each subject by round, and the seconds of its first decoding."""
    generator = torch.Generator().manual_seed(run.seed)
    prompts = torch.randint(
        run.model.vocab_size, (run.batch_size, run.prompt), generator=generator, dtype=torch.int64, device="cpu"
    ).to(device)
    plain = run.model.replace(mhc_enabled=False)
    subjects = {
        OURS: ours(run, run.model.replace(mhc_enabled=True), prompts),
        PLAIN: ours(run, plain, prompts),
        PEER: theirs(run, plain, prompts),
    }
    first, speeds = {}, {name: [] for name in subjects}  # type: dict[str, float], dict[str, list[float]]
    for name, start in subjects.items():
        first[name] = timed(start(), device)
        print(f"{name}: first decoding {first[name]:.1f} s", file=sys.stderr, flush=True)
    # From here on a recompilation would be measured, and be a fault.
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(run.rounds):
            for name, start in subjects.items():
                speeds[name].append(run.batch_size * run.new_tokens / timed(start(), device))
    return speeds, first


def report(run: DecodeConfig, device: torch.device, speeds: dict[str, list[float]], first: dict[str, float]) -> Any:
    """Everything measured, as JSON values. The floor is what a step must read: all weights once."""
    weights = size_bytes(fn.init(run.model.replace(mhc_enabled=False), device="meta"))
    return {
        **provenance(device, ["torch", "transformers", "triton"]),
        "command": " ".join(["python recipes/benchmark.py decode", *sys.argv[1:]]),
        "model": dataclasses.asdict(run.model),
        "batch_size": run.batch_size,
        "prompt": run.prompt,
        "new_tokens": run.new_tokens,
        "cache_size": run.cache_size,
        "rounds": run.rounds,
        "rows": [
            {
                "name": name,
                "tokens_per_s": statistics.median(found),
                "tokens_per_s_best": max(found),
                "ratio_to_llama": statistics.median(a / b for a, b in zip(found, speeds[PEER], strict=True)),
                "first_s": first[name],
            }
            for name, found in speeds.items()
        ],
        "mhc_us_per_sub_layer": 1e6
        * run.batch_size
        * statistics.median(1 / a - 1 / b for a, b in zip(speeds[OURS], speeds[PLAIN], strict=True))
        / (2 * run.model.num_layers),
        "weights_gb_per_s": weights * statistics.median(speeds[PLAIN]) / run.batch_size / 1e9,
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{result['device']}, {result['processor']}, fp32, {result['date']}"]
    lines.append(", ".join(f"{name} {number}" for name, number in result["versions"].items()))
    lines.append(f"{'':<34}{'tokens/s':>10}{'best':>10}{'of Llama':>10}{'first s':>9}")
    for r in result["rows"]:
        lines.append(
            f"{r['name']:<34}{r['tokens_per_s']:>10.1f}{r['tokens_per_s_best']:>10.1f}{r['ratio_to_llama']:>10.3f}"
            f"{r['first_s']:>9.1f}"
        )
    lines.append(
        f"mHC takes {result['mhc_us_per_sub_layer']:.1f} us per sub-layer; without it weights are read at "
        f"{result['weights_gb_per_s']:.1f} GB/s"
    )
    return "\n".join(lines)


@torch.no_grad()
def main(run: DecodeConfig) -> None:
    """Measure, print, write."""
    device = pick_device(run.device)
    check_compiler(device, True)
    if run.threads:
        torch.set_num_threads(run.threads)
    result = report(run, device, *measure(run, device))
    print(table(result))
    shape = f"{run.model.hidden_dim}x{run.model.num_layers}"
    print(f"written to {write_result(run.output_dir, f'benchmark_decode_{device.type}_{shape}.json', result)}")


if __name__ == "__main__":
    command(DecodeConfig, __file__, main)
