"""Tokenizer and token files of a run, made once and reused while data and tokenizer are unchanged."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from rlm_mhc.data.identity import Identity, identify
from rlm_mhc.data.packing import HELD_OUT_EVERY, Sequences, hold_out, windows
from rlm_mhc.data.reuse import locked, make_or_reuse, write_whole
from rlm_mhc.data.sources import BadLines, Source, digest
from rlm_mhc.data.token_file import encode_documents, read_tokens, token_dtype, write_tokens
from rlm_mhc.data.tokenizer import (
    bos_ids,
    id_bound,
    load_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)

FORMAT = 3
TRAIN_FILE, EVAL_FILE = "train.bin", "eval.bin"


class Prepared(NamedTuple):
    """Training and evaluation rows (evaluation may be empty), the tokenizer, a fingerprint of the training rows, the
    fraction of invalid lines, the tokens that end a turn (fine-tuning only), and the fingerprint that earlier versions
    computed."""

    train: Sequences
    evaluation: Sequences
    tokenizer: Any
    fingerprint: str
    bad_fraction: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    former: str = ""

    def has(self, fingerprint: Any) -> bool:
        """Return whether a checkpoint with this fingerprint was trained on these rows."""
        return bool(fingerprint) and fingerprint in (self.fingerprint, self.former)


def prepare(
    folder: Path,
    source: Source,
    eval_source: Source | None,
    *,
    tokenizer: str,
    vocab_size: int,
    max_length: int,
    strict: bool = False,
    max_bad_fraction: float = 0.01,
    say: Callable[[str], object] = print,
) -> Prepared:
    """Tokenize the sources into `folder`, or reuse what lies there from the same data and tokenizer.

    Args:
        folder: for `train.bin`, `eval.bin`, `meta.json` and, for `auto`, the tokenizer.
        source: documents to train on.
        eval_source: documents for evaluation; None holds out every hundredth of `source`, or where that is
            nothing the last hundredth of its windows.
        tokenizer: `auto`, or a path or name for `AutoTokenizer`.
        vocab_size: of the model.
        max_length: tokens per training sequence.
        strict: whether one bad line is an error; otherwise it is skipped, counted, and one of the first few named.
        max_bad_fraction: the share of bad lines that is an error all the same.
        say: receives one line per thing done.

    Raises:
        FileNotFoundError: on a missing tokenizer.
        ValueError: on bad data, naming file and line, or when there is no text at all.
    """
    with locked(folder, say):
        identity = identify(folder, [source, eval_source])
        bad = BadLines(strict=strict, max_fraction=max_bad_fraction)
        made = _tokenizer(folder, source, identity, tokenizer, vocab_size, say, bad)
        bad = BadLines(strict=strict, max_fraction=max_bad_fraction, say=say)
        key, former = ([FORMAT, *prints, tokenizer_fingerprint(made)] for prints in identity)
        dtype = token_dtype(id_bound(made))
        write = partial(_write_tokens, source, eval_source, made, dtype, bad)
        # Earlier versions chose the width by the number of entries, too small where ids have gaps.
        reusable = former if dtype == token_dtype(len(made)) else None
        meta, reused = make_or_reuse(folder, key, [TRAIN_FILE, EVAL_FILE], write, bad, reusable)
        train, evaluation = (windows(read_tokens(folder / name, dtype), max_length) for name in (TRAIN_FILE, EVAL_FILE))
    origin = f"reused from {folder}" if reused else f"from {meta['documents']:,} documents"
    say_skipped(meta, say)
    own = meta["train"] + (meta["eval"] if eval_source is None else 0)
    if own <= meta["documents"] * len([*bos_ids(made), made.eos_token_id]):  # beginnings and ends of text alone
        raise ValueError(f"{source.name}: it holds no text to train on")
    if evaluation.total < 1 and eval_source is not None:
        raise ValueError(f"{eval_source.name}: it holds no text to evaluate on")
    if evaluation.total < 1:
        train, evaluation = hold_out(train)
    tokens = meta["train"] + meta["eval"]
    held_out = says_held_out(evaluation, "windows")
    say(f"tokens       {tokens:,} {origin}: {train.total:,} windows of {max_length} to train on, {held_out}")
    fingerprint, before = (digest([name, max_length, train.total]) for name in (key, former))
    return Prepared(train, evaluation, made, fingerprint, bad_share(meta), former=before)


def bad_share(meta: dict[str, Any]) -> float:
    """Return the fraction of invalid lines."""
    return meta["bad"] / max(meta["lines"], 1)


def say_skipped(meta: dict[str, Any], say: Callable[[str], object]) -> None:
    """Say how many lines and files were skipped, if any."""
    if meta["bad"]:
        say(f"bad lines    {meta['bad']:,} of {meta['lines']:,} skipped")
    if meta.get("empty_files"):
        say(f"empty files  {meta['empty_files']:,} skipped")


def says_held_out(evaluation: Sequences, what: str) -> str:
    """In words."""
    if not evaluation.total:
        return "too few to hold any out: no eval/loss"
    return f"{evaluation.total:,} {what} for eval/loss"


def _tokenizer(
    folder: Path,
    source: Source,
    identity: Identity,
    name: str,
    vocab_size: int,
    say: Callable[[str], object],
    bad: BadLines,
) -> Any:
    if name != "auto":
        return load_tokenizer(name, vocab_size)
    home, key_file = folder / "tokenizer", folder / "tokenizer" / "trained_on.json"
    key, former = (json.dumps([FORMAT, prints[0], vocab_size]) for prints in identity)
    if key_file.is_file() and key_file.read_text(encoding="utf-8") in (key, former):
        return load_tokenizer(str(home), vocab_size)
    say(f"tokenizer    training a byte-level BPE of {vocab_size:,} entries on the data …")
    trained = train_tokenizer(source, vocab_size, bad)
    shutil.rmtree(home, ignore_errors=True)
    save_tokenizer(trained, home)
    write_whole(key_file, key.encode())  # last: without it the folder does not count
    return trained


def _write_tokens(
    source: Source,
    eval_source: Source | None,
    tokenizer: Any,
    dtype: np.dtype,
    bad: BadLines,
    files: dict[str, BinaryIO],
) -> dict[str, Any]:
    counts = {"documents": 0, "train": 0, "eval": 0}
    for index, ids in enumerate(_encoded(source, tokenizer, dtype, "tokenizing", bad)):
        held_out = eval_source is None and index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        part, name = ("eval", EVAL_FILE) if held_out else ("train", TRAIN_FILE)
        counts[part] += write_tokens(files[name], [ids])
        counts["documents"] += 1
    if eval_source is not None:
        encoded = _encoded(eval_source, tokenizer, dtype, "tokenizing eval", bad)
        counts["eval"] = write_tokens(files[EVAL_FILE], encoded)
    return counts


def _encoded(source: Source, tokenizer: Any, dtype: np.dtype, what: str, bad: BadLines) -> Iterator[np.ndarray]:
    with tqdm(desc=what, unit=" tokens", unit_scale=True) as bar:
        for ids in encode_documents(source.read(bad), tokenizer, dtype):
            bar.update(len(ids))
            yield ids
