"""Examples of their own: one to a row, so that none attends to another, and the loss on a part of each."""

from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from rlm_mhc.data.identity import identify
from rlm_mhc.data.instructions import Example
from rlm_mhc.data.packing import HELD_OUT_EVERY, hold_out, padded
from rlm_mhc.data.prepare import Prepared, bad_share, say_skipped, says_held_out
from rlm_mhc.data.reuse import locked, make_or_reuse
from rlm_mhc.data.sources import BadLines, Source, digest
from rlm_mhc.data.spans import segment_ids
from rlm_mhc.data.token_file import batches, read_tokens, token_dtype
from rlm_mhc.data.tokenizer import bos_ids, id_bound, special_tokens, tokenizer_fingerprint
from rlm_mhc.types import IGNORED_TARGET

FORMAT, FORMER_FORMAT = 3, 2
KINDS = ("bin", "counted", "lengths")
NAMED_KEYS = 20
COUNTED, LENGTHS = np.dtype(np.bool_), np.dtype(np.uint32)


class Examples(NamedTuple):
    """Example i is `tokens[ends[i-1] : ends[i]]`; `counted` says of each token whether the loss is on it.

    Sequences are padded on the right, to `length`. Packing several examples into one would waste less, and would let
    them attend to one another.
    """

    tokens: np.ndarray
    counted: np.ndarray
    ends: np.ndarray
    length: int
    first: int
    total: int

    def inputs_and_targets(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Example `index` as int64 inputs and targets of `length`; what does not count is target -100.

        >>> counted = np.array([False, False, True])
        >>> Examples(np.array([5, 6, 7]), counted, np.array([3]), 4, 0, 1).inputs_and_targets(0)
        (array([5, 6, 0, 0]), array([-100,    7, -100, -100]))
        """
        number = self.first + index
        own = slice(self.ends[number - 1] if number else 0, self.ends[number])
        tokens = np.asarray(self.tokens[own], dtype=np.int64)
        targets = np.where(self.counted[own], tokens, IGNORED_TARGET)
        return padded(tokens[:-1], targets[1:], self.length)


def prepare_examples(
    folder: Path,
    source: Source,
    eval_source: Source | None,
    *,
    tokenizer: Any,
    max_length: int,
    strict: bool = False,
    max_bad_fraction: float = 0.01,
    say: Callable[[str], object] = print,
) -> Prepared:
    """Tokenize examples into `folder`, or reuse what lies there from the same data and tokenizer.

    Args:
        folder: for the files.
        source: of `Example`s, to train on.
        eval_source: for evaluation; None holds out every hundredth of `source`, at least one where there are two.
        tokenizer: a loaded one.
        max_length: tokens per row; a longer example is cut at its end, and bad where nothing that counts is left.
        strict: whether one bad line is an error; otherwise it is skipped, counted, and one of the first few named.
        max_bad_fraction: the share of bad lines that is an error all the same.
        say: receives one line per thing done.

    Raises:
        ValueError: on bad data, naming file and line, or when there is no example at all.
    """
    bad = BadLines(strict=strict, max_fraction=max_bad_fraction, say=say)
    write = partial(_write, source, eval_source, tokenizer, max_length, bad)
    names = [f"{part}.{kind}" for part in ("train", "eval") for kind in KINDS]
    with locked(folder, say):
        identity = identify(folder, [source, eval_source])
        encoding = [tokenizer_fingerprint(tokenizer), max_length]
        key = ["examples", FORMAT, *identity.content, *encoding]
        former = ["examples", FORMER_FORMAT, *identity.former, *encoding]
        meta, reused = make_or_reuse(folder, key, names, write, bad)
        dtype = token_dtype(id_bound(tokenizer))
        train, evaluation = (_read(folder, part, dtype, max_length) for part in ("train", "eval"))
    say_skipped(meta, say)
    for given, made in ((source, train), (eval_source, evaluation)):
        if given is not None and made.total < 1:
            raise ValueError(f"{given.name}: it holds no example")
    if evaluation.total < 1:
        train, evaluation = hold_out(train)
    origin = f"reused from {folder}" if reused else f"from {meta['train'] + meta['eval']:,} examples"
    longest = max(np.diff(part.ends, prepend=0).max(initial=1) for part in (train, evaluation)) - 1
    say(
        f"tokens       {meta['tokens']:,} {origin}, {meta['counted']:,} of them counted: {train.total:,} to train on, "
        f"rows of {max_length} tokens (the longest needs {longest}), {says_held_out(evaluation, 'examples')}"
    )
    _say_of_examples(meta, max_length, say)
    ends = stop_token_ids(train, special_tokens(tokenizer).values())
    if not ends:
        say("warning      no special token that ends an example is learned, so generation will not stop by itself")
    fingerprint, before = (digest([name, train.total]) for name in (key, former))
    if meta["ended"]:  # earlier versions appended no end of text: their rows were others
        before = ""
    return Prepared(train, evaluation, tokenizer, fingerprint, bad_share(meta), ends, before)


def _say_of_examples(meta: dict[str, Any], length: int, say: Callable[[str], object]) -> None:
    if meta["cut"]:
        say(f"cut          {meta['cut']:,} examples at data.max_length={length} tokens")
    if meta["ended"]:
        say(
            f"end of text  is appended to {meta['ended']:,} examples, and learned: the chat template ends the "
            "assistant's turns with no special token, at which generation could stop"
        )
    if meta["unused"]:
        say(f"no effect    of the keys {', '.join(map(repr, meta['unused']))}: the chat template does not name them")


class Encoded(NamedTuple):
    """The tokens of an example, at most `length + 1`, which of them count, and whether it was cut."""

    example: Example
    tokens: np.ndarray
    counted: np.ndarray
    cut: bool


def encode(examples: Iterator[Example], tokenizer: Any, length: int, bad: BadLines) -> Iterator[Encoded]:
    """Tokenize examples.

    Raises:
        ValueError: as `BadLines` has it on an example without a target.
    """
    for example, row in _rows(examples, tokenizer):
        cut = row[: length + 1]
        tokens, counted = (np.array([column[i] for column in cut]) for i in range(2))
        if counted[1:].any():
            used = int(np.flatnonzero(counted)[-1]) + 1
            yield Encoded(example, tokens[:used], counted[:used], len(row) > length + 1)
            continue
        what = f"none of the first {length} (data.max_length) of its {len(row)} tokens is before one that counts"
        bad.skip(ValueError(f"{example.where}: {what}; raise that, or shorten the prompt"), counted=True)


def stop_token_ids(examples: Examples, special: Collection[int]) -> tuple[int, ...]:
    """Those of the special tokens with which what counts ends, in whole examples.

    >>> counted = np.array([False, True, True, False, True])
    >>> stop_token_ids(Examples(np.array([5, 6, 1, 5, 2]), counted, np.array([3, 5]), 4, 0, 2), [0, 1, 2])
    (1, 2)
    """
    last = np.append(~examples.counted[1:], True)
    last[examples.ends - 1] = np.diff(examples.ends, prepend=0) <= examples.length  # a longer one may have been cut
    return tuple(token for token in np.unique(examples.tokens[examples.counted & last]).tolist() if token in special)


def _rows(examples: Iterator[Example], tokenizer: Any) -> Iterator[tuple[Example, list[tuple[int, bool]]]]:
    """Of each example the tokens, and whether they count."""
    first, last = [(token, False) for token in bos_ids(tokenizer)], (tokenizer.eos_token_id, True)
    # A span is tokenized by itself, behind the one before it, and before the one behind it.
    for batch in batches(examples, lambda example: 3 * sum(len(part.text) for part in example.spans)):
        for rendered, group in groupby(batch, attrgetter("rendered")):
            alike = list(group)
            texts = [[part.text for part in example.spans] for example in alike]
            for example, ids in zip(alike, segment_ids(texts, tokenizer, special=rendered), strict=True):
                parts = zip(example.spans, ids, strict=True)
                row = [(token, part.counted) for part, own in parts for token in own]
                yield example, [*([] if rendered else first), *row, *([] if example.closed else [last])]


def _write(
    source: Source,
    eval_source: Source | None,
    tokenizer: Any,
    length: int,
    bad: BadLines,
    files: dict[str, BinaryIO],
) -> dict[str, Any]:
    said = {"train": 0, "eval": 0, "tokens": 0, "counted": 0, "cut": 0, "ended": 0}
    unused: set[str] = set()
    dtype = token_dtype(id_bound(tokenizer))
    for given, kind in ((source, "train"), *([(eval_source, "eval")] if eval_source is not None else [])):
        rows = encode(given.read(bad), tokenizer, length, bad)
        for index, (example, tokens, counted, cut) in enumerate(tqdm(rows, desc="tokenizing", unit=" examples")):
            held_out = eval_source is None and index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            part = "eval" if held_out else kind
            columns = (tokens.astype(dtype), counted.astype(COUNTED), np.array([len(tokens)], LENGTHS))
            for name, column in zip(KINDS, columns, strict=True):
                files[f"{part}.{name}"].write(column.tobytes())
            said[part] += 1
            said["tokens"] += len(tokens)
            said["counted"] += int(counted.sum())
            said["cut"] += cut
            said["ended"] += example.rendered and not example.closed
            if len(unused) < NAMED_KEYS:
                unused |= example.unused
    return {**said, "unused": sorted(unused)[:NAMED_KEYS]}


def _read(folder: Path, part: str, dtype: np.dtype, length: int) -> Examples:
    kinds = zip(KINDS, (dtype, COUNTED, LENGTHS), strict=True)
    tokens, counted, lengths = (read_tokens(folder / f"{part}.{kind}", own) for kind, own in kinds)
    return Examples(tokens, counted, np.cumsum(lengths, dtype=np.int64), length, 0, len(lengths))
