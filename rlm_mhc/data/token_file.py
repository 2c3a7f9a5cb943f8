"""Documents as one memory-mapped file of token ids, each document followed by the end-of-text token."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from rlm_mhc.data.tokenizer import bos_ids

T = TypeVar("T")
BATCH_CHARACTERS = 4_000_000


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id.

    >>> token_dtype(65536)
    dtype('uint16')
    """
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def encode_documents(texts: Iterable[str], tokenizer: Any, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The ids of each document, which begins as the tokenizer begins every text, with end-of-text behind them; batches
    are encoded in parallel by `tokenizers`."""
    first = bos_ids(tokenizer)
    for batch in batches(texts, len):
        # A document that spells a special token means its letters, not the token.
        for ids in token_ids(batch, tokenizer, special=False):
            yield np.asarray([*first, *ids, tokenizer.eos_token_id], dtype=dtype)


def token_ids(texts: list[str], tokenizer: Any, *, special: bool) -> list[list[int]]:
    """The ids of each text by itself; `special`: where it spells a special token, that is meant."""
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=not special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded["input_ids"]


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


def batches(items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Lists of some four million characters, `size(item)` being those of one."""
    batch: list[T] = []
    total = 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= BATCH_CHARACTERS:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
