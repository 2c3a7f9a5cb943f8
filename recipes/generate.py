"""Text from a checkpoint, as it is generated: `python recipes/generate.py checkpoint=DIR prompt="…" [key=value …]`.

Text goes to stdout, tokens per second to stderr. On a terminal its control characters are escaped; a file or a pipe
receives them as they are.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rlm_mhc import ModelConfig, fn, load_pretrained
from rlm_mhc.checkpoint.config_files import load_generation_config, stop_tokens
from rlm_mhc.data.tokenizer import id_bound, load_tokenizer
from rlm_mhc.disk import text_lines
from rlm_mhc.params import with_one_matrix_dtype
from rlm_mhc.program import make_decoder
from rlm_mhc.train import command, pick_device
from rlm_mhc.train.device import check_compiler
from rlm_mhc.train.safe_stream import visible
from rlm_mhc.train.text import encode, text_pieces
from rlm_mhc.validation import at_least, location, one_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig(fn.Sampling):
    """What to generate, from what, and how tokens are drawn."""

    temperature: float = at_least(0, 0.8)
    checkpoint: str = location("")
    prompt: str | None = None
    prompt_file: str | None = location(None)
    max_new_tokens: int = at_least(1, 200)
    compile: bool = False
    device: str = one_of("auto", "cpu", "cuda")
    seed: int = at_least(0, 0)
    debug: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.checkpoint:
            raise ValueError("checkpoint: give a folder, as outputs/pretrain_1b/checkpoints/checkpoint-600")
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError(f"prompt_file={self.prompt_file}: give either prompt or prompt_file")

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields of `fn.Sampling`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(fn.Sampling)}


@dataclasses.dataclass
class Clock:
    """Seconds until the first token, and of the others, and how many there were."""

    first: float = 0.0
    rest: float = 0.0
    tokens: int = 0

    def watch(self, steps: Iterator[fn.Drawn]) -> Iterator[int]:
        """The tokens of one row, each timed until it is known on the host."""
        start = time.perf_counter()
        for drawn, _ in steps:
            token = int(drawn)
            seconds = time.perf_counter() - start
            self.first, self.rest = (seconds, 0.0) if not self.tokens else (self.first, self.rest + seconds)
            self.tokens += 1
            yield token
            start = time.perf_counter()

    def __str__(self) -> str:
        decoded = self.tokens - 1
        return f"{decoded} decoded at {decoded / self.rest:,.1f} tokens/s" if decoded else "nothing decoded after it"


def read_prompts(run: GenerateConfig) -> list[str]:
    """The prompts, one or those of the file."""
    if run.prompt_file is None:
        return [run.prompt or ""]
    content = sys.stdin.buffer.read() if run.prompt_file == "-" else Path(run.prompt_file).read_bytes()
    prompts = text_lines(content, f"prompt_file={run.prompt_file}")
    if not any(map(str.strip, prompts)):
        raise ValueError(f"prompt_file={run.prompt_file}: it holds no prompt")
    return prompts


def require_room(run: GenerateConfig, config: ModelConfig, longest: int) -> int:
    """The size of cache that all prompts fit into."""
    size = longest + run.max_new_tokens
    if size > config.max_seq_len:
        raise ValueError(
            f"max_new_tokens={run.max_new_tokens}: with a prompt of {longest} tokens more than the model's "
            f"max_seq_len={config.max_seq_len}; at most {max(0, config.max_seq_len - longest)} fit"
        )
    return size


def main(run: GenerateConfig) -> None:
    """Load, generate prompt by prompt, say how fast."""
    device = pick_device(run.device)
    check_compiler(device, run.compile)
    params, config = load_pretrained(run.checkpoint, device=device)
    params = with_one_matrix_dtype(params, config)
    tokenizer = load_tokenizer(run.checkpoint, config.vocab_size)
    stops = stop_tokens(load_generation_config(Path(run.checkpoint))) or [tokenizer.eos_token_id]
    prompts = [(prompt, encode(tokenizer, prompt)) for prompt in read_prompts(run)]
    size = require_room(run, config, max(len(ids) for _, ids in prompts))
    decoder = make_decoder(config, cache_size=size, compiled=run.compile)
    generator = torch.Generator(device).manual_seed(run.seed)

    def steps(ids: list[int], count: int) -> Iterator[fn.Drawn]:
        return fn.generate_steps(
            params,
            torch.tensor([ids], dtype=torch.int64, device=device),
            config,
            max_new_tokens=count,
            stop_tokens=stops,
            generator=generator,
            vocab_size=id_bound(tokenizer),
            decoder=decoder,
            **run.sampling,
        )

    if run.compile:
        print("compiling the decode step …", file=sys.stderr, flush=True)
        first = torch.zeros(1, 1, dtype=torch.int64, device=device)
        fn.generate(params, first, config, max_new_tokens=min(2, size - 1), decoder=decoder)
    shown = visible if sys.stdout.isatty() else str
    for prompt, ids in prompts:
        clock = Clock()
        print(shown(prompt), end="", flush=True)
        for piece in text_pieces(tokenizer, clock.watch(steps(ids, run.max_new_tokens)), ids, stops):
            print(shown(piece), end="", flush=True)
        print(flush=True)
        print(f"prompt of {len(ids)} tokens at {len(ids) / clock.first:,.1f} tokens/s, {clock}", file=sys.stderr)


if __name__ == "__main__":
    command(GenerateConfig, __file__, main, texts=["prompt"])
