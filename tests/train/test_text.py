"""A prompt as a model reads it."""

from rlm_mhc.data import Source, train_tokenizer
from rlm_mhc.testing.tokenizers import llama_tokenizer
from rlm_mhc.train.text import encode


def test_a_prompt_begins_as_the_tokenizer_begins_texts():
    tokenizer = llama_tokenizer(["hello world"] * 9)
    assert encode(tokenizer, "hello") == tokenizer("hello")["input_ids"]
    assert encode(tokenizer, "hello")[0] == tokenizer.bos_token_id
    assert encode(tokenizer, "<s>hello").count(tokenizer.bos_token_id) == 1
    assert encode(tokenizer, "") == [tokenizer.bos_token_id]


def test_an_empty_prompt_of_our_tokenizers_is_what_a_document_begins_after():
    tokenizer = train_tokenizer(Source("words", "w", lambda bad: iter(["hello world"] * 9)), 270)
    assert encode(tokenizer, "") == [tokenizer.eos_token_id]
    assert encode(tokenizer, "hello") == tokenizer("hello")["input_ids"]
