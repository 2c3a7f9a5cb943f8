"""Filters of logits, against transformers' processors."""

import pytest
import torch
from transformers.generation import logits_process as theirs

from rlm_mhc import fn

V = 50
CASES = [
    (dict(repetition_penalty=1.7), lambda: theirs.RepetitionPenaltyLogitsProcessor(1.7)),
    (dict(repetition_penalty=0.5), lambda: theirs.RepetitionPenaltyLogitsProcessor(0.5)),
    (dict(temperature=0.3), lambda: theirs.TemperatureLogitsWarper(0.3)),
    (dict(top_k=1), lambda: theirs.TopKLogitsWarper(1)),
    (dict(top_k=7), lambda: theirs.TopKLogitsWarper(7)),
    (dict(top_k=99), lambda: theirs.TopKLogitsWarper(99)),
    (dict(top_p=0.0), lambda: theirs.TopPLogitsWarper(0.0)),
    (dict(top_p=0.6), lambda: theirs.TopPLogitsWarper(0.6)),
    (dict(top_p=1.0), lambda: theirs.TopPLogitsWarper(1.0)),
    (dict(min_p=0.1), lambda: theirs.MinPLogitsWarper(0.1)),
    (dict(min_p=1.0), lambda: theirs.MinPLogitsWarper(1.0)),
]


def case(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, V, generator=generator, dtype=torch.float64)
    logits[0, :5] = logits[0, 7]  # ties
    tokens = torch.randint(V, (6, 12), generator=generator)
    seen = torch.zeros(6, V, dtype=torch.bool).scatter(-1, tokens, True)
    return logits.to(dtype), tokens, seen


@pytest.mark.parametrize(("sampling", "processor"), CASES, ids=lambda case: str(case) if isinstance(case, dict) else "")
def test_each_filter_is_that_of_transformers(sampling, processor):
    logits, tokens, seen = case()
    ours = fn.filter_logits(logits, fn.Sampling(**sampling), seen)
    assert torch.equal(ours, processor()(tokens, logits))
    assert torch.equal(ours[2], fn.filter_logits(logits[2], fn.Sampling(**sampling), seen[2]))


def test_all_together_are_in_the_order_of_transformers_generate():
    logits, tokens, seen = case()
    together = dict(repetition_penalty=1.3, temperature=2.0, top_k=10, top_p=0.8, min_p=0.2)
    order = [
        theirs.RepetitionPenaltyLogitsProcessor(1.3),
        theirs.TemperatureLogitsWarper(2.0),
        theirs.TopKLogitsWarper(10),
        theirs.TopPLogitsWarper(0.8),
        theirs.MinPLogitsWarper(0.2),
    ]
    expected = chain(order, tokens, logits)
    assert torch.equal(fn.filter_logits(logits, fn.Sampling(**together), seen), expected)
    for first, second in ((1, 3), (2, 3), (3, 4)):  # numbers for which the order and each of them shows
        swapped = order.copy()
        swapped[first], swapped[second] = order[second], order[first]
        assert not torch.equal(chain(swapped, tokens, logits), expected)
    assert all(not torch.equal(chain([p for p in order if p is not left], tokens, logits), expected) for left in order)


def chain(processors, tokens, logits):
    for processor in processors:
        logits = processor(tokens, logits)
    return logits


def test_draws_follow_the_filtered_logits():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(20000, 4)
    seen = torch.tensor([True, False, False, False]).expand(20000, 4)
    sampling = dict(temperature=0.7, top_k=3, repetition_penalty=1.5)
    drawn = fn.sample_token(logits, torch.Generator().manual_seed(0), seen, **sampling)
    expected = fn.filter_logits(logits[0], fn.Sampling(**sampling), seen[0]).softmax(-1)
    torch.testing.assert_close(drawn.bincount(minlength=4) / 20000, expected, atol=0.012, rtol=0)


def test_half_precision_is_filtered_in_single():
    logits, _, _ = case(torch.bfloat16)
    assert fn.filter_logits(logits, fn.Sampling(top_p=0.9)).dtype == torch.float32


def test_a_penalty_without_what_was_seen_is_refused():
    with pytest.raises(ValueError, match=r"repetition_penalty=1\.2: needs seen"):
        fn.sample_token(torch.zeros(3), repetition_penalty=1.2, temperature=0.0)
