"""Models in a GGUF file, read by transformers and dequantised."""

import importlib.util
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rlm_mhc.convert.layouts import architecture_of
from rlm_mhc.validation import in_short

MAGIC = b"GGUF"
PACKAGES = ("gguf", "accelerate")
# Metadata with a vocabulary of 256k entries is below this.
HEADER_BYTES = 1 << 26


def is_gguf(file: Path) -> bool:
    """Return whether a file begins as every GGUF does."""
    with file.open("rb") as content:
        return content.read(len(MAGIC)) == MAGIC


def load_gguf(file: Path) -> Any:
    """Return the module that transformers makes of a GGUF file, dequantised to fp32 and whole in memory.

    Raises:
        ValueError: naming the file, on an architecture other than those in `layouts`, a scaled rotary embedding
            (which transformers would drop), missing weights, damage, or where a package is missing.
    """
    import transformers

    _require_packages(file)
    _require_default_rope(file)
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    with _errors_named(file):
        config = transformers.AutoConfig.from_pretrained(**place)
    architecture_of(config.to_dict(), str(file))
    # Later versions keep some architectures packed unless told otherwise.
    how = {"quantization_config": transformers.GgufConfig(dequantize=True)} if _can_pack(transformers) else {}
    with _errors_named(file):
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            **place, **how, config=config, dtype=torch.float32, output_loading_info=True
        )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{file}: it has no {missing[0]}; is it one part of several? Merge them by llama-gguf-split")
    return model


def gguf_tokenizer(file: Path) -> Any:
    """Return the tokenizer in a GGUF file, with its chat template.

    Raises:
        ValueError: naming the file, when there is none that transformers can read.
    """
    from transformers import AutoTokenizer

    with _errors_named(file):
        return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


def _can_pack(transformers: Any) -> bool:
    return hasattr(transformers, "GgufConfig")


def _require_packages(file: Path) -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{file}: a GGUF file is read by packages that are missing; pip install {' '.join(missing)}")


def _require_default_rope(file: Path) -> None:
    """Raise on a scaled rotary embedding, which transformers drops when it reads a GGUF file."""
    with file.open("rb") as content:
        header = content.read(HEADER_BYTES)
    # A key is followed by the number of its type, 6 being float32, and its value.
    factor = re.search(rb"\.rope\.scaling\.factor\x06\0\0\0(.{4})", header, re.DOTALL)
    scaled = factor is not None and struct.unpack("<f", factor[1])[0] not in (0.0, 1.0)
    if scaled or b"rope_freqs.weight" in header:
        raise ValueError(f"{file}: its rotary embedding is scaled; this library has the default one of all dimensions")


@contextmanager
def _errors_named(file: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes the reader fail anywhere
        raise ValueError(
            f"{file}: transformers cannot read it ({in_short(error)}); is the file whole, and of a kind it knows?"
        ) from None
