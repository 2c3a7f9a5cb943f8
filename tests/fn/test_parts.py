"""Norm, rotary embedding, attention, sampling."""

import pytest
import torch
import torch.nn.functional as F

from rlm_mhc import fn


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm_equals_torch(dtype):
    x, w = torch.randn(3, 16, dtype=dtype), torch.randn(16, dtype=dtype)
    torch.testing.assert_close(fn.rms_norm(x, w, 1e-5), F.rms_norm(x, (16,), w, 1e-5))


def test_rotary_embedding_keeps_lengths_and_depends_on_distance_alone():
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    cos, sin = (t.double() for t in fn.rotary_table(torch.arange(20), 8))
    rotated_q, rotated_k = (fn.rotary_embedding(x.expand(1, 20, 8), cos, sin)[0] for x in (q, k))
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm().expand(20))
    products = rotated_q @ rotated_k.T
    torch.testing.assert_close(products[5, 3], products[17, 15], atol=1e-6, rtol=0)
    assert (products[5, 3] - products[5, 4]).abs() > 1e-3


def test_odd_head_is_refused():
    with pytest.raises(ValueError, match="head_dim=5"):
        fn.rotary_table(torch.arange(3), 5)


def test_attention_equals_the_formula_with_grouped_heads():
    q, k, v = torch.randn(2, 6, 9, 4), torch.randn(2, 2, 9, 4), torch.randn(2, 2, 9, 4)
    repeated_k, repeated_v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
    scores = q @ repeated_k.mT / 2
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(fn.causal_attention(q, k, v), scores.softmax(-1) @ repeated_v)


def test_sampling():
    logits = torch.tensor([[0.0, 3.0, 2.0, -1.0]]).expand(5000, 4)
    generator = torch.Generator().manual_seed(0)
    drawn = fn.sample_token(logits, generator)
    shares = drawn.bincount(minlength=4) / 5000
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.03, rtol=0)
    assert fn.sample_token(logits[0], generator).shape == ()
    assert set(fn.sample_token(logits, generator, top_k=2).tolist()) == {1, 2}
    assert set(fn.sample_token(logits, temperature=0.0).tolist()) == {1}
    assert set(fn.sample_token(logits, top_k=99).tolist()) <= {0, 1, 2, 3}
    with pytest.raises(ValueError, match=r"temperature=-1\.0"):
        fn.sample_token(logits, temperature=-1.0)
    with pytest.raises(ValueError, match="top_k=0"):
        fn.sample_token(logits, top_k=0)
