"""The tokenizer: any that transformers loads, or a byte-level BPE trained on the data."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlm_mhc.config import MODEL_TYPE
from rlm_mhc.data.sources import BadLines, Source

END_OF_TEXT = "<|endoftext|>"
BYTE_ENTRIES = 257
TRAINING_CHARACTERS = 64_000_000


def train_tokenizer(source: Source, vocab_size: int, bad: BadLines | None = None) -> Any:
    """A byte-level BPE of at most `vocab_size` entries, trained on the first 64 million characters of the source.

    Every string is encodable and comes back unchanged. Entry 0 is the end-of-text token. `bad` says what happens at a
    bad line; None: an error.

    Raises:
        ValueError: when `vocab_size` leaves no room for the 256 bytes and end of text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < BYTE_ENTRIES:
        raise ValueError(f"model.vocab_size={vocab_size}: data.tokenizer=auto needs at least {BYTE_ENTRIES} entries")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_head(source.read(bad or BadLines()), TRAINING_CHARACTERS), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",  # where generation wants it; nothing else here pads
        clean_up_tokenization_spaces=False,
        model_max_length=int(1e30),
    )


def load_tokenizer(name: str, vocab_size: int) -> Any:
    """`AutoTokenizer.from_pretrained(name)`, checked to fit the model.

    Raises:
        FileNotFoundError: when there is no tokenizer by that path or name.
        ValueError: when it has no end-of-text token, or ids that the model lacks.
    """
    from transformers import AutoTokenizer

    if Path(name).is_dir() and not has_tokenizer(Path(name)):
        raise FileNotFoundError(f"data.tokenizer={name}: the folder holds no tokenizer files")
    try:
        # Without this a checkpoint that names its code would ask at the terminal whether to run it.
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **_config_of_ours(Path(name)))
    except Exception as error:
        # transformers raises many kinds here, among them plain Exceptions of the Rust library for damaged files.
        reason = str(error).strip().split("\n")[0][:200]
        raise FileNotFoundError(
            f"data.tokenizer={name}: cannot be loaded ({type(error).__name__}: {reason}); "
            "give a folder with a tokenizer, a name on the hub, or auto"
        ) from None
    for how_it_was_found in ("is_local", "local_files_only"):  # transformers would save that with it
        tokenizer.init_kwargs.pop(how_it_was_found, None)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"data.tokenizer={name}: it has no end-of-text token (eos_token) to separate documents with")
    if (needed := id_bound(tokenizer)) > vocab_size:
        raise ValueError(
            f"data.tokenizer={name}: its {len(tokenizer)} entries have ids up to {needed - 1}, more than "
            f"model.vocab_size={vocab_size} allows; set model.vocab_size={needed}, or for a trained model give the "
            "tokenizer it was trained with"
        )
    return tokenizer


def id_bound(tokenizer: Any) -> int:
    """Return the largest id + 1, which is what `vocab_size` of a model must reach.

    `len(tokenizer)` counts entries, and the ids of a pruned or merged tokenizer have gaps.
    """
    return 1 + max([*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder, *tokenizer.all_special_ids])


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write its files.

    Raises:
        OSError: when they cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        # What the Rust library makes of a full disk.
        raise OSError(f"{folder}: the tokenizer cannot be written ({error})") from None


def _config_of_ours(folder: Path) -> dict[str, Any]:
    """For a checkpoint of this library an empty config: transformers would warn that it does not know ours, which
    says nothing of the tokenizer."""
    from transformers import PretrainedConfig

    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    ours = isinstance(fields, dict) and fields.get("model_type") == MODEL_TYPE
    return {"config": PretrainedConfig()} if ours else {}


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds files of a tokenizer."""
    return any(folder.glob("*token*")) or any(folder.glob("vocab*"))


def bos_ids(tokenizer: Any) -> list[int]:
    """The beginning-of-text token, where a tokenizer puts it before every text by itself; otherwise nothing."""
    begins = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer("")["input_ids"][:1]
    return [tokenizer.bos_token_id] if begins else []


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """All special tokens with their ids, those among them that have no role of transformers', as `<|im_end|>`."""
    added = tokenizer.added_tokens_decoder.items()
    return {token.content: number for number, token in added if token.special}


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A digest of everything that decides how text is encoded."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    marks = ":".join(map(str, [*bos_ids(tokenizer), tokenizer.eos_token_id]))
    return hashlib.sha256(f"{marks}:{content}".encode()).hexdigest()[:16]


def _head(texts: Iterator[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text
