"""A prompt as a model reads it."""

import pytest
import torch

from rlm_mhc import fn
from rlm_mhc.data import Source, train_tokenizer
from rlm_mhc.testing import small_config
from rlm_mhc.testing.tokenizers import llama_tokenizer, tokenizer_with_gaps
from rlm_mhc.train.text import encode, sample_text


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


def test_end_of_text_beyond_a_gap_of_the_ids_is_drawn_and_ends_the_text():
    tokenizer = train_tokenizer(Source("words", "w", lambda bad: iter(["hello world"] * 9)), 270)
    gaps = tokenizer_with_gaps(tokenizer, 299)
    config = small_config(vocab_size=300, num_layers=1, tie_embeddings=False)
    params = fn.init(config)
    state = fn.collapse_streams(fn.backbone(params, torch.tensor([encode(gaps, "hello")]), config).hidden.x)[0, -1]
    head = torch.zeros(300, config.hidden_dim)
    head[tokenizer("!")["input_ids"][0]], head[299] = state / 2, state  # the likeliest is end of text, then "!"
    params = params._replace(lm_head=params.lm_head._replace(weight=head))
    assert sample_text(params, config, gaps, "hello", tokens=1, top_k=1) == "hello"
    assert sample_text(params, config, tokenizer, "hello", tokens=1, top_k=1) == "hello!"


def test_a_prompt_that_is_no_text_is_named():
    with pytest.raises(ValueError, match=r"prompt='x\\udcff': it has bytes that are no text"):
        encode(None, "x\udcff")
