"""What raw operations are given, and what is refused before they are."""

import pytest
import torch

from rlm_mhc import fn
from rlm_mhc.fn.layout import overlap, unshared
from rlm_mhc.kernels.sinkhorn import sinkhorn
from rlm_mhc.stage.attention import SDPA
from rlm_mhc.testing import small_config


def heads(count, s=7, b=2, dtype=torch.float32):
    return torch.ones(b, count, s, 8, dtype=dtype)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        (heads(4, s=0), heads(2, s=0), heads(2, s=0), r"queries \[2, 4, 0, 8\]: expected at least one"),
        (heads(4, b=0), heads(2, b=0), heads(2, b=0), r"queries \[0, 4, 7, 8\]: expected at least one"),
        (heads(4), heads(2, s=3), heads(2, s=3), r"keys torch\.float32 \[2, 2, 3, 8\]: expected float32"),
        (heads(4), heads(2), heads(2, s=3), r"values torch\.float32 \[2, 2, 3, 8\]"),
        (heads(4), heads(2, b=1), heads(2, b=1), r"keys torch\.float32 \[1, 2, 7, 8\]"),
        (heads(4), heads(3), heads(3), "4 query heads, 3 key heads"),
        (heads(4), heads(2, dtype=torch.float64), heads(2), r"keys torch\.float64"),
    ],
)  # fmt: skip
def test_attention_that_would_read_other_memory_is_refused(q, k, v, message):
    with pytest.raises(ValueError, match=message):
        SDPA.forward({}, (q, k, v))
    with pytest.raises(ValueError, match=message):
        SDPA.backward({}, (q, k, v), (q, q[..., 0]), q)


def test_a_cotangent_of_another_size_is_refused():
    q, k = heads(4), heads(2)
    out, saved = SDPA.forward({}, (q, k, k))
    with pytest.raises(ValueError, match=r"cotangent torch\.float32 \[2, 4, 3, 8\]: expected float32 \[2, 4, 7, 8\]"):
        SDPA.backward({}, (q, k, k), saved, out[:, :, :3])


@pytest.mark.parametrize(
    ("logits", "cotangent", "message"),
    [
        (torch.zeros(7, 3, 3, dtype=torch.float16), None, r"logits torch\.float16"),
        (torch.zeros(4, 3), None, r"logits torch\.float32 \[4, 3\]"),
        (torch.zeros(7, 3, 3), torch.zeros(2, 3, 3), r"cotangent torch\.float32 \[2, 3, 3\]: expected"),
        (torch.zeros(7, 3, 3), torch.zeros(7, 3, 3, dtype=torch.float64), r"cotangent torch\.float64"),
    ],
)  # fmt: skip
def test_the_ops_themselves_refuse_what_they_would_misread(logits, cotangent, message):
    ops = torch.ops.rlm_mhc
    with pytest.raises(ValueError, match=message):
        ops.sinkhorn(logits, 5, 0.0) if cotangent is None else ops.sinkhorn_backward(logits, cotangent, 5, 0.0)


def test_expanded_and_negated_logits_are_read_as_they_are():
    one = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(one.expand(5, 3, 3), 4)[2], fn.sinkhorn_knopp(one, num_iters=4))
    torch.testing.assert_close(sinkhorn(torch._neg_view(one), 4), fn.sinkhorn_knopp(-one, num_iters=4))


def test_what_shares_memory_is_found():
    x = torch.zeros(6, 4)
    assert overlap([x[:3], x[3:]]) is None
    assert overlap([x[:, :2], x[:, 2:], x[1:2, 1:2]]) == (0, 2)
    assert overlap([x[:, ::2], x[:, 1::2]]) is None
    assert overlap([x[:, ::2], x[:, 1::2].mT, x[:, 3]]) == (1, 2)
    assert overlap([torch.zeros(1), x.mT, x]) == (1, 2)
    assert overlap([x, x.view(torch.int32).view(24)[5:6]]) == (0, 1)
    assert overlap([x[:, :2], x.view(torch.float16)[:, 4:]]) == (0, 1)  # of other widths: by their spans
    assert overlap([x[:0], x]) is None
    assert overlap([x[:1]], [x[1:], x]) == (0, 2)
    assert overlap([], [x, x, x[:1].expand(3, 4)]) is None
    g = torch.ones(3)
    assert unshared([g, x])[0] is g
    first, second = unshared([g, g])
    first += 1
    assert (first[0], second[0], g[0]) == (2, 1, 1)


CONFIG = small_config(num_layers=1)
SHAPES = [(2, 0), (0, 3), (0,)]


@pytest.mark.parametrize("shape", SHAPES)
def test_no_token_is_refused_by_every_function_of_the_model(shape):
    params, tokens = fn.init(CONFIG), torch.zeros(shape, dtype=torch.int64)
    cache = fn.init_cache(CONFIG, shape[:-1], 4)
    message = rf"tokens {list(shape)}: expected at least one sequence and one token".replace("[", r"\[")
    for call in (
        lambda: fn.forward(params, tokens, CONFIG),
        lambda: fn.backbone(params, tokens, CONFIG),
        lambda: fn.loss(params, fn.Batch(tokens, tokens), CONFIG),
        lambda: fn.prefill(params, tokens, CONFIG, cache),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    if len(shape) == 2:
        with pytest.raises(ValueError, match="expected at least one row and one token"):
            fn.generate(params, tokens, CONFIG, max_new_tokens=2)


def test_targets_of_another_shape_or_dtype_are_refused():
    params, tokens = fn.init(CONFIG), torch.zeros(2, 3, dtype=torch.int64)
    for targets in (tokens[:1], tokens[:, :2], tokens.int(), tokens.float()):
        with pytest.raises(ValueError, match=r"targets torch\.\w+ \[\d, \d\]: expected int64 \[2, 3\]"):
            fn.loss(params, fn.Batch(tokens, targets), CONFIG)
    with pytest.raises(ValueError, match=r"tokens torch\.float32 \[2, 3\]: expected int64 or int32"):
        fn.loss(params, fn.Batch(tokens.float(), tokens), CONFIG)
