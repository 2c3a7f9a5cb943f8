"""From text to batches: documents, tokenizer, token file, windows, and a loader whose position is a value."""

from rlm_mhc.data.chat import with_template
from rlm_mhc.data.examples import Examples, prepare_examples
from rlm_mhc.data.instructions import chat_parse, completion_parse, find_format
from rlm_mhc.data.loader import Position, eval_batches, next_batch
from rlm_mhc.data.packing import PackedSequences, Sequences, hold_out
from rlm_mhc.data.prepare import Prepared, prepare
from rlm_mhc.data.sources import BadLines, Source, builtin_source, jsonl_source, record_source
from rlm_mhc.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

__all__ = [
    "BadLines",
    "Examples",
    "PackedSequences",
    "Position",
    "Prepared",
    "Sequences",
    "Source",
    "builtin_source",
    "chat_parse",
    "completion_parse",
    "eval_batches",
    "find_format",
    "hold_out",
    "jsonl_source",
    "load_tokenizer",
    "next_batch",
    "prepare",
    "prepare_examples",
    "record_source",
    "save_tokenizer",
    "train_tokenizer",
    "with_template",
]
