"""Tokenizer and token files of a run, made once and reused while data and tokenizer are unchanged."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from rlm_mhc.data.packing import Windows, hold_out, windows
from rlm_mhc.data.sources import BadLines, Source
from rlm_mhc.data.token_file import encode_documents, read_tokens, token_dtype, write_tokens
from rlm_mhc.data.tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer
from rlm_mhc.disk import replace_file, sync

HELD_OUT_EVERY = 100
META_FILE = "meta.json"
FORMAT = 2


class Prepared(NamedTuple):
    """Windows to train on and to evaluate on (possibly none), the tokenizer they were made with, a fingerprint of the
    training windows: where it is the same, so is each window; and the share of the lines read that were bad."""

    train: Windows
    evaluation: Windows
    tokenizer: Any
    fingerprint: str
    bad_fraction: float = 0.0


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
    bad = BadLines(strict=strict, max_fraction=max_bad_fraction)
    made = _tokenizer(folder, source, tokenizer, vocab_size, say, bad)
    bad = BadLines(strict=strict, max_fraction=max_bad_fraction, say=say)
    sources = [source.fingerprint, eval_source.fingerprint if eval_source else "held-out"]
    key = [FORMAT, *sources, tokenizer_fingerprint(made)]
    dtype = token_dtype(len(made))
    meta = _read_meta(folder)
    if not _written(folder, meta, key, dtype, bad):
        meta = _write_tokens(folder, source, eval_source, made, dtype, bad) | {"key": key}
        _write_whole(folder / META_FILE, json.dumps(meta, indent=2).encode())
        origin = f"from {meta['documents']:,} documents"
    else:
        origin = f"reused from {folder}"
    if meta["bad"]:
        say(f"bad lines    {meta['bad']:,} of {meta['lines']:,} skipped")
    train, evaluation = (windows(read_tokens(folder / f"{part}.bin", dtype), max_length) for part in ("train", "eval"))
    own = meta["train"] + (meta["eval"] if eval_source is None else 0)
    if own <= meta["documents"]:  # ends of text alone
        raise ValueError(f"{source.name}: it holds no text to train on")
    if evaluation.total < 1 and eval_source is not None:
        raise ValueError(f"{eval_source.name}: it holds no text to evaluate on")
    if evaluation.total < 1:
        train, evaluation = hold_out(train)
    held_out = (
        f"{evaluation.total:,} windows for eval/loss" if evaluation.total else "too few to hold any out: no eval/loss"
    )
    tokens = meta["train"] + meta["eval"]
    say(f"tokens       {tokens:,} {origin}: {train.total:,} windows of {max_length} to train on, {held_out}")
    fingerprint = hashlib.sha256(json.dumps([key, max_length, train.total]).encode()).hexdigest()[:16]
    return Prepared(train, evaluation, made, fingerprint, meta["bad"] / max(meta["lines"], 1))


def _tokenizer(
    folder: Path, source: Source, name: str, vocab_size: int, say: Callable[[str], object], bad: BadLines
) -> Any:
    if name != "auto":
        return load_tokenizer(name, vocab_size)
    home, key_file = folder / "tokenizer", folder / "tokenizer" / "trained_on.json"
    key = json.dumps([FORMAT, source.fingerprint, vocab_size])
    if key_file.is_file() and key_file.read_text(encoding="utf-8") == key:
        return load_tokenizer(str(home), vocab_size)
    say(f"tokenizer    training a byte-level BPE of {vocab_size:,} entries on the data …")
    trained = train_tokenizer(source, vocab_size, bad)
    shutil.rmtree(home, ignore_errors=True)
    trained.save_pretrained(home)
    _write_whole(key_file, key.encode())  # last: without it the folder does not count
    return trained


def _write_tokens(
    folder: Path, source: Source, eval_source: Source | None, tokenizer: Any, dtype: np.dtype, bad: BadLines
) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / META_FILE).unlink(missing_ok=True)
    counts = {"documents": 0, "train": 0, "eval": 0}
    parts = [folder / "train.bin", folder / "eval.bin"]
    # A run that still maps the former files keeps them: they are replaced, not overwritten.
    temporary = [part.with_name(part.name + ".tmp") for part in parts]
    with temporary[0].open("wb") as train, temporary[1].open("wb") as evaluation:
        for index, ids in enumerate(_encoded(source, tokenizer, dtype, "tokenizing", bad)):
            held_out = eval_source is None and index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            part, file = ("eval", evaluation) if held_out else ("train", train)
            counts[part] += write_tokens(file, [ids])
            counts["documents"] += 1
        if eval_source is not None:
            counts["eval"] = write_tokens(evaluation, _encoded(eval_source, tokenizer, dtype, "tokenizing eval", bad))
    bad.finish()
    for written, final in zip(temporary, parts, strict=True):
        sync(written)
        os.replace(written, final)
    return counts | {"lines": bad.lines, "bad": bad.bad}


def _encoded(source: Source, tokenizer: Any, dtype: np.dtype, what: str, bad: BadLines) -> Iterator[np.ndarray]:
    with tqdm(desc=what, unit=" tokens", unit_scale=True) as bar:
        for ids in encode_documents(source.read(bad), tokenizer, dtype):
            bar.update(len(ids))
            yield ids


def _written(folder: Path, meta: dict[str, Any], key: list[Any], dtype: np.dtype, bad: BadLines) -> bool:
    """Whether the token files are there, whole, of this key, and without more bad lines than are allowed now."""
    if meta.get("key") != key:
        return False
    if meta["bad"] and (bad.strict or meta["bad"] > bad.max_fraction * meta["lines"]):
        return False
    files = ((folder / f"{part}.bin", meta[part] * dtype.itemsize) for part in ("train", "eval"))
    return all(file.is_file() and file.stat().st_size == size for file, size in files)


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / META_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write_whole(file: Path, content: bytes) -> None:
    replace_file(file, lambda path: path.write_bytes(content))
