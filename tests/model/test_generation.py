"""Generation by transformers: the longest sequence, and a paged cache."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from rlm_mhc.model.generation import LengthError

SMALL = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)  # by default it takes most of the memory
LIMIT = 64  # of `small_config`


@pytest.fixture
def greedy():
    return GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=60, pad_token_id=60)


def test_a_paged_cache_generates_the_same_tokens(make_model, tokens, greedy):
    model = make_model()
    expected = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=greedy)[:, 9:]
    options = dict(generation_config=greedy, continuous_batching_config=SMALL, warmup=False)
    results = model.generate_batch(tokens.tolist(), **options)
    rows = [result.generated_tokens for result in results.values()]
    assert [row + [60] * (8 - len(row)) for row in rows] == expected.tolist()


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2}])
def test_more_tokens_than_the_longest_sequence_are_refused_before_the_first(make_model, tokens, options):
    model = make_model()
    calls = []
    model.register_forward_pre_hook(lambda *args: calls.append(args))
    with pytest.raises(LengthError, match=r"65, more than max_seq_len=64"):
        model.generate(tokens, max_new_tokens=LIMIT - 9 + 1, **options)
    assert not calls


@pytest.mark.parametrize("ids", [None, 9], ids=["embeddings alone", "ids too"])
def test_a_prompt_of_embeddings_counts_as_well(make_model, tokens, ids):
    model = make_model()
    prompt = dict(inputs_embeds=model.get_input_embeddings()(tokens), pad_token_id=0, eos_token_id=None)
    if ids is not None:
        prompt["input_ids"] = tokens
    with pytest.raises(LengthError):
        model.generate(**prompt, max_new_tokens=LIMIT - 9 + 1)
    assert model.generate(**prompt, max_new_tokens=2).shape == (2, 2 if ids is None else 11)


def test_as_many_as_the_longest_sequence_has_are_generated(make_model, tokens):
    assert make_model().generate(tokens, max_new_tokens=LIMIT - 9, eos_token_id=None).shape == (2, LIMIT)


def test_a_batch_of_requests_has_the_same_bound(make_model, tokens, greedy):
    model = make_model()
    with pytest.raises(LengthError):
        model.generate_batch(tokens.tolist(), generation_config=greedy, max_new_tokens=LIMIT - 9 + 1)
    manager = model.init_continuous_batching(generation_config=greedy)
    with pytest.raises(LengthError):
        manager.add_request([1] * (LIMIT - 8 + 1))
    with pytest.raises(LengthError):
        manager.add_request([1] * 9, "name", LIMIT - 9 + 1)


def test_requests_without_a_number_of_new_tokens_may_fill_the_window(make_model, tokens, greedy):
    model = make_model()
    greedy.max_new_tokens = None
    prompts = [[1] * (LIMIT - 4), tokens[0].tolist()]
    results = model.generate_batch(prompts, generation_config=greedy, warmup=False, continuous_batching_config=SMALL)
    expected = [
        model.generate(torch.tensor([row]), max_length=LIMIT, eos_token_id=None)[0, len(row) :] for row in prompts
    ]
    assert [result.generated_tokens for result in results.values()] == [row.tolist() for row in expected]
    assert [result.error for result in results.values()] == [None, None]


def test_a_forward_beyond_the_longest_sequence_is_refused_with_and_without_a_cache(make_model, tokens):
    model = make_model()
    row = tokens[:1, :1].expand(1, LIMIT)
    cache = model(row).past_key_values
    with pytest.raises(ValueError, match="sequence of 65 tokens"):
        model(tokens[:1, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="sequence of 65 tokens"):
        model(tokens[:1, :1], past_key_values=cache, position_ids=torch.tensor([[LIMIT]]))
    with pytest.raises(ValueError, match="sequence of 65 tokens"):
        model(torch.cat([row, row[:, :1]], 1))


def test_packed_documents_may_be_longer_together_and_do_not_see_one_another(make_model, tokens):
    model = make_model()
    documents = [tokens[:1, :5].repeat(1, 8), tokens[1:, :6].repeat(1, 6)]
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents]).unsqueeze(0)
    packed = model(torch.cat(documents, 1), position_ids=positions, use_cache=False).logits
    expected = torch.cat([model(d).logits for d in documents], 1)
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-5)
