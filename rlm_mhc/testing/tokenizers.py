"""Tokenizers of other kinds than ours."""

from typing import Any


def llama_tokenizer(texts: list[str], vocab_size: int = 320, *, legacy: bool = False) -> Any:
    """One of Llama's kind, trained on texts: a space is written `▁`, one begins a text, and `<s>` stands before it.

    `legacy`: what comes behind a special token begins with `▁` as well, as in Llama 2.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def tokenizer_with_gaps(tokenizer: Any, end_of_text: int) -> Any:
    """Return a fast tokenizer whose end of text has that id, and every other entry the id that it had."""
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    fields["model"]["vocab"][tokenizer.eos_token] = end_of_text
    for token in fields["added_tokens"]:
        if token["content"] == tokenizer.eos_token:
            token["id"] = end_of_text
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(fields)), eos_token=tokenizer.eos_token
    )
