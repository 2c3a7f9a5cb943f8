"""Documents as one memory-mapped file of token ids, each document followed by the end-of-text token."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

BATCH_CHARACTERS = 4_000_000


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id.

    >>> token_dtype(65536)
    dtype('uint16')
    """
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def encode_documents(texts: Iterable[str], tokenizer: Any, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The ids of each document with end-of-text behind them; batches are encoded in parallel by `tokenizers`."""
    for batch in _batches(texts):
        encoded = tokenizer(
            batch,
            add_special_tokens=False,
            # A document that spells a special token means its letters, not the token.
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for ids in encoded["input_ids"]:
            yield np.asarray([*ids, tokenizer.eos_token_id], dtype=dtype)


def write_tokens(file: BinaryIO, documents: Iterable[np.ndarray]) -> int:
    """Append documents to an open file; returns the number of tokens."""
    total = 0
    for ids in documents:
        file.write(ids.tobytes())
        total += len(ids)
    return total


def read_tokens(path: str | os.PathLike, dtype: np.dtype) -> np.ndarray:
    """The file as a read-only memory map (an empty array for an empty file)."""
    if Path(path).stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
