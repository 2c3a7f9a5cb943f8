"""Generating tokens: a host loop around a prefill and a decode step, which may be compiled."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.cache import Cache, init_cache
from rlm_mhc.fn.decode import extend, prefill
from rlm_mhc.fn.linear import embedding
from rlm_mhc.fn.sample import Sampling, draw, mark
from rlm_mhc.params import LMParams
from rlm_mhc.types import PerRow, Tokens
from rlm_mhc.validation import build


class Decoder(NamedTuple):
    """How a model is run: `prefill` and `extend(params, tokens, config, cache, lengths=…)` as in `fn`; they may write
    into the cache. `cache_size`: the one size of caches that they are for, where they are compiled for one."""

    prefill: Callable[..., tuple[Tensor, Cache]] = partial(prefill, donate=True)
    extend: Callable[..., tuple[Tensor, Cache]] = partial(extend, donate=True)
    cache_size: int | None = None


class Generated(NamedTuple):
    """`tokens [b, s + new]`: each row's prompt and right after it what was generated, padded on the right with 0;
    `lengths [b]`: how many tokens of each row count, a stop token among them."""

    tokens: Tensor
    lengths: Tensor


class Drawn(NamedTuple):
    """One step of `generate_steps`: `tokens [b]`, and `counted [b]`, False for rows that had ended before."""

    tokens: Tensor
    counted: Tensor


def generate(
    params: LMParams,
    tokens: Tokens,
    config: ModelConfig,
    *,
    max_new_tokens: int,
    lengths: PerRow | None = None,
    **how: Any,
) -> Generated:
    """Prompts and what the model goes on with; greedy unless a temperature is given.

    Args:
        params: the tree of `fn.init`.
        tokens: `[b, s]` prompts; rows shorter than s are padded on the right, with any id.
        config: the model's shape.
        max_new_tokens: how many tokens each row gets, fewer where it stops.
        lengths: tokens of each prompt, `[b]`, from 1 to s; None: s.
        **how: `stop_tokens`, `generator`, `cache_size`, `vocab_size`, `decoder` and the fields of `Sampling`; see
            `generate_steps`.

    Raises:
        ValueError: as `generate_steps`.

    >>> from rlm_mhc import fn
    >>> config = ModelConfig.preset("tiny")
    >>> out = fn.generate(fn.init(config), torch.tensor([[1, 2, 3]]), config, max_new_tokens=4, stop_tokens=[0])
    >>> out.tokens.shape
    torch.Size([1, 7])
    """
    steps = generate_steps(params, tokens, config, max_new_tokens=max_new_tokens, lengths=lengths, **how)
    b, s = tokens.shape
    ends = lengths if lengths is not None else torch.full((b,), s, dtype=torch.int64, device=tokens.device)
    # One column more than there is room for: there goes what rows draw that have ended.
    out = F.pad(tokens * within(ends, s), (0, max_new_tokens + 1))
    for drawn, counted in steps:
        place = torch.where(counted, ends, out.shape[-1] - 1)
        out = out.scatter(-1, place.unsqueeze(-1), drawn.unsqueeze(-1))
        ends = ends + counted
    return Generated(out[:, :-1], ends)


def generate_steps(
    params: LMParams,
    tokens: Tokens,
    config: ModelConfig,
    *,
    max_new_tokens: int,
    lengths: PerRow | None = None,
    stop_tokens: Sequence[int] = (),
    generator: torch.Generator | None = None,
    cache_size: int | None = None,
    vocab_size: int | None = None,
    decoder: Decoder | None = None,
    **sampling: Any,
) -> Iterator[Drawn]:
    """`generate` token by token, each before the next is computed; ends where all rows have stopped.

    Args:
        params: the tree of `fn.init`.
        tokens: `[b, s]` prompts, padded on the right.
        config: the model's shape.
        max_new_tokens: how many steps there are at most.
        lengths: tokens of each prompt, `[b]`; None: s.
        stop_tokens: a row ends with the first of these that it draws.
        generator: what draws are taken from, on the device of the tokens; needed at a temperature above 0.
        cache_size: tokens that a row of the cache has room for; None: as many as may come.
        vocab_size: only ids below it are drawn; None: all of the model's. A tokenizer may have fewer.
        decoder: how the model is run; None: uncompiled, by the reference.
        **sampling: fields of `Sampling`; `temperature` is 0 unless given.

    Raises:
        ValueError: naming the argument, its value and what is allowed, before anything is computed.

    >>> from rlm_mhc import fn
    >>> config = ModelConfig.preset("tiny")
    >>> steps = fn.generate_steps(fn.init(config), torch.tensor([[1, 2, 3]]), config, max_new_tokens=2)
    >>> [drawn.counted.item() for drawn in steps]
    [True, True]
    """
    rule = build(Sampling, {"temperature": 0.0} | sampling)
    decoder = decoder or Decoder()
    size = cache_size or decoder.cache_size or tokens.shape[-1] + max_new_tokens
    ends = lengths
    if ends is None:
        ends = torch.full(tokens.shape[:1], tokens.shape[-1], dtype=torch.int64, device=tokens.device)
    _require_lengths(tokens, ends, max_new_tokens, size)
    _require_ids(stop_tokens, vocab_size, config)
    if rule.temperature > 0 and generator is None:
        raise ValueError(f"temperature={rule.temperature}: draws are taken from a generator; give a torch.Generator")
    if decoder.cache_size not in (None, size):
        raise ValueError(f"cache_size={size}: the decoder is for caches of {decoder.cache_size}")
    computed = embedding(params.embed_tokens, tokens[:1, :1]).dtype  # norms, or an adapter's weights, may have another
    cache = init_cache(config, tokens.shape[0], size, dtype=computed, device=tokens.device)

    def read(cache: Cache, drawn: Tensor | None) -> tuple[Tensor, Cache]:
        if drawn is None:
            return decoder.prefill(params, tokens, config, cache, lengths=ends)
        return decoder.extend(params, drawn.unsqueeze(-1), config, cache)

    seen = None
    if rule.repetition_penalty != 1:
        nothing = torch.zeros(tokens.shape[0], config.vocab_size, dtype=torch.bool, device=tokens.device)
        seen = mark(nothing, tokens, within(ends, tokens.shape[-1]))

    def choose(logits: Tensor, seen: Tensor | None) -> Tensor:
        kept = slice(vocab_size)
        return draw(logits[:, kept], rule, generator, None if seen is None else seen[:, kept])

    stops = torch.tensor(stop_tokens, dtype=torch.int64, device=tokens.device)
    return _steps(read, choose, cache, seen, stops, max_new_tokens)


@torch.no_grad()
def _steps(
    read: Callable[[Cache, Tensor | None], tuple[Tensor, Cache]],
    choose: Callable[[Tensor, Tensor | None], Tensor],
    cache: Cache,
    seen: Tensor | None,
    stops: Tensor,
    count: int,
) -> Iterator[Drawn]:
    """Read, choose, hand out, `count` times or until all rows have drawn a stop token."""
    drawn, counted = None, torch.ones_like(cache.lengths, dtype=torch.bool)
    for _ in range(count):
        logits, cache = read(cache, drawn)
        drawn = choose(logits, seen)
        yield Drawn(drawn, counted)
        if len(stops):
            counted = counted & ~torch.isin(drawn, stops)
            if not counted.any():
                return
        if seen is not None:
            seen = mark(seen, drawn.unsqueeze(-1), counted.unsqueeze(-1))


def within(lengths: PerRow, size: int) -> Bool[Tensor, "*b s"]:
    """True at the first `lengths` of `size` places of each row.

    >>> within(torch.tensor([1, 2]), 2)
    tensor([[ True, False],
            [ True,  True]])
    """
    return torch.arange(size, dtype=torch.int64, device=lengths.device) < lengths.unsqueeze(-1)


def _require_lengths(tokens: Tensor, lengths: Tensor, new: int, size: int) -> None:
    b, s = tokens.shape
    if b < 1 or s < 1:
        raise ValueError(f"tokens {[b, s]}: expected at least one row and one token; begin with an end-of-text token")
    if new < 1:
        raise ValueError(f"max_new_tokens={new}: expected at least 1")
    if s + new > size:
        raise ValueError(f"prompt of {s} tokens and max_new_tokens={new}: the cache has room for {size}")
    if lengths.shape != (b,) or bool((lengths < 1).any() | (lengths > s).any()):
        raise ValueError(f"lengths={lengths.tolist()}: expected {b} numbers from 1 to {s}, the width of the prompts")


def _require_ids(stop_tokens: Sequence[int], vocab_size: int | None, config: ModelConfig) -> None:
    if vocab_size is not None and not 1 <= vocab_size <= config.vocab_size:
        raise ValueError(f"vocab_size={vocab_size}: expected 1 to {config.vocab_size}, the model's")
    if wrong := [token for token in stop_tokens if not 0 <= token < config.vocab_size]:
        raise ValueError(f"stop_tokens={wrong}: expected ids from 0 to {config.vocab_size - 1}")
