"""From text to batches: documents, tokenizer, token file, windows, and a loader whose position is a value."""

from rlm_mhc.data.loader import Position, eval_batches, next_batch
from rlm_mhc.data.packing import Windows, hold_out
from rlm_mhc.data.prepare import Prepared, prepare
from rlm_mhc.data.sources import BadLines, Source, builtin_source, jsonl_source
from rlm_mhc.data.tokenizer import load_tokenizer, train_tokenizer

__all__ = [
    "BadLines",
    "Position",
    "Prepared",
    "Source",
    "Windows",
    "builtin_source",
    "eval_batches",
    "hold_out",
    "jsonl_source",
    "load_tokenizer",
    "next_batch",
    "prepare",
    "train_tokenizer",
]
