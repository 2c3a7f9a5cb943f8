"""Documents and windows: what a token does not see has no effect."""

import pytest
import torch
import torch.nn.functional as F

from rlm_mhc import fn
from rlm_mhc.fn.attention import attend, causal_attention, masked_attention
from rlm_mhc.fn.context import attention_mask
from rlm_mhc.testing import assert_as_accurate, small_config
from rlm_mhc.testing.models import double, perturbed
from rlm_mhc.tree import tree_leaves


def inputs(**fields):
    config = small_config(**fields)
    tokens = torch.randint(config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    return config, perturbed(fn.init(config), 0.2), tokens


@pytest.mark.parametrize("preset", ["paper", "single_pass"])
def test_packed_documents_are_computed_as_if_each_were_alone(preset):
    config, params, tokens = inputs(mhc_preset=preset)
    documents = torch.tensor([[0] * 5 + [1] * 7, [7] * 1 + [3] * 11])
    context = fn.positions(tokens, config, documents=documents)

    def packed(p):
        return fn.forward(p, tokens, config, context=context)

    def alone(p):
        parts = [(row, own) for row, ids in enumerate(documents) for own in (ids == ids[0], ids != ids[0])]
        logits = [fn.forward(p, tokens[row, own].unsqueeze(0), config)[0] for row, own in parts]
        return torch.stack([torch.cat(logits[:2]), torch.cat(logits[2:])])

    assert_as_accurate(packed(params), alone(params), alone(double(params)))
    assert (packed(params) - fn.forward(params, tokens, config)).abs().max() > 0.01


@pytest.mark.parametrize("window", [1, 3, 12, 100])
def test_a_window_is_attention_over_the_last_tokens(window):
    q, k, v = (torch.randn(2, heads, 12, 8, dtype=torch.float64) for heads in (4, 2, 2))
    table = torch.zeros(12, 4)
    distance = torch.arange(12).unsqueeze(-1) - torch.arange(12)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1)) / 8**0.5
    weights = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf).softmax(-1)
    expected = torch.einsum("bhqk,bhkd->bhqd", weights, v.repeat_interleave(2, 1))
    actual = attend(q, k, v, fn.Context(table, table, window=window)).output
    torch.testing.assert_close(actual, expected)
    if window >= 12:
        torch.testing.assert_close(actual, causal_attention(q, k, v))


def test_gradients_do_not_cross_documents():
    config, params, tokens = inputs(num_layers=1)
    context = fn.positions(tokens, config, documents=torch.tensor([[0] * 5 + [1] * 7] * 2))
    x = F.embedding(tokens, params.embed_tokens.weight)

    def second(x):
        hidden = fn.block(params.layers[0], fn.expand(x, config), context, config).hidden
        return hidden.x[:, 5:].sum()

    grad = torch.func.grad(second)(x)
    assert (grad[:, :5] == 0).all()
    assert (grad[:, 5:] != 0).any(-1).all()


def test_forward_mode_equals_reverse_mode_under_a_mask():
    config, params, tokens = inputs(num_layers=1)
    params = double(params)
    context = fn.positions(tokens, config, documents=torch.zeros_like(tokens), window=3)

    def loss(p):
        return fn.forward(p, tokens, config, context=context).square().sum()

    _, tangent = torch.func.jvp(loss, (params,), (params,))
    grads = torch.func.grad(loss)(params)
    expected = sum((g * p).sum() for g, p in zip(tree_leaves(grads), tree_leaves(params), strict=True))
    torch.testing.assert_close(tangent, expected)


def test_heads_of_a_group_read_the_same_keys():
    q, k, v = (torch.randn(3, heads, s, 8, dtype=torch.float64) for heads, s in ((6, 4), (2, 9), (2, 9)))
    mask = torch.rand(3, 4, 9) < 0.5
    mask[..., 0] = True
    repeated = (x.repeat_interleave(3, 1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, *repeated, attn_mask=mask.unsqueeze(1))
    torch.testing.assert_close(masked_attention(q, k, v, mask), expected)


def test_one_document_needs_no_mask():
    config, _, tokens = inputs()
    assert attention_mask(fn.positions(tokens, config)) is None
    with pytest.raises(ValueError, match=r"documents \[12\]: expected \[2, 12\]"):
        fn.positions(tokens, config, documents=tokens[0])
    with pytest.raises(ValueError, match="window=-1"):
        fn.positions(tokens, config, window=-1)
