"""Spans are tokenized as the parts of one text, with a border between tokens at each of theirs."""

from itertools import chain

import pytest

from rlm_mhc.data import Source, train_tokenizer
from rlm_mhc.data.spans import segment_ids
from rlm_mhc.testing.tokenizers import llama_tokenizer

WORDS = ["1+1=", "2", "[INST]", "hello", "yes", "[/INST]", "Answer:", "no", "world", "\n\n"]
CHAT = ["<s>[INST] hello [/INST]", "yes world</s>", "[INST] yes [/INST]", "no</s>"]


def byte_level():
    return train_tokenizer(Source("words", "w", lambda bad: iter([" ".join(WORDS)] * 20)), 330)


def llama(legacy=False):
    return llama_tokenizer(WORDS * 20, 340, legacy=legacy)


def slow():
    """One without the Rust library, and so without offsets."""
    from transformers import CanineTokenizer

    return CanineTokenizer(bos_token="\ue000", eos_token="\ue001")


KINDS = {"byte_level": byte_level, "metaspace": llama, "legacy": lambda: llama(legacy=True), "slow": slow}


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def spans(tokenizer, *texts):
    return next(segment_ids([list(texts)], tokenizer, special=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_cut_between_its_tokens_keeps_them(kind):
    tokenizer = KINDS[kind]()
    for texts in (["1+1=", "2"], ["Answer:", " yes", " no"], CHAT):
        assert list(chain(*spans(tokenizer, *texts))) == ids_of(tokenizer, "".join(texts))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "completion"), [("Answer: ", "yes"), ("hel", "lo"), ("no\n\n", "yes"), ("\n", "\n")]
)
def test_a_prompt_has_the_tokens_that_generation_begins_with(kind, prompt, completion):
    tokenizer = KINDS[kind]()
    first, second = spans(tokenizer, prompt, completion)
    assert first == ids_of(tokenizer, prompt)
    assert tokenizer.decode(first + second) == prompt + completion


def test_a_token_across_a_border_gives_way():
    for tokenizer, name in ((llama(), "▁yes"), (byte_level(), "Ġyes")):
        joined = tokenizer.convert_ids_to_tokens(ids_of(tokenizer, "Answer: yes"))
        assert joined[-1] == name
        first, second = spans(tokenizer, "Answer: ", "yes")
        assert tokenizer.convert_ids_to_tokens(first)[-1] == name[0]
        assert "".join(tokenizer.convert_ids_to_tokens(second)) == "yes"
