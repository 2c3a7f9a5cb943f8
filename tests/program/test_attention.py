import pytest
import torch
from torch.func import vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlm_mhc import fn
from rlm_mhc.fn.kernels import Differentiable
from rlm_mhc.program.attention import PLAIN, SDPA, attention_stage
from rlm_mhc.testing import TOLERANCE, assert_trees_close


def heads(h, kv, s, d, dtype, transposed=False):
    def draw(count):
        if transposed:  # adjacent entries far apart
            return torch.randn(2, count, d, s, dtype=dtype).mT
        return torch.randn(2, s, count, d, dtype=dtype).transpose(1, 2)

    return draw(h), draw(kv), draw(kv), torch.randn(2, h, s, d, dtype=dtype)


def reference(q, k, v, cotangent):
    def attend(q, k, v):
        with sdpa_kernel(SDPBackend.MATH):
            return fn.causal_attention(q, k, v)

    out, pull = vjp(attend, q, k, v)
    return out, pull(cotangent)


@pytest.mark.parametrize("kernel", [SDPA, PLAIN, fn.causal_attention, lambda q, k, v: fn.causal_attention(q, k, v)])
@pytest.mark.parametrize(("h", "kv", "s", "d"), [(4, 4, 7, 8), (4, 2, 1, 2), (6, 1, 33, 6)])
@pytest.mark.parametrize("transposed", [False, True])
def test_output_and_gradients_equal_the_formula(kernel, h, kv, s, d, transposed):
    for dtype in (torch.float64, torch.float32):
        q, k, v, cotangent = heads(h, kv, s, d, dtype, transposed)
        expected, expected_grads = reference(q, k, v, cotangent)
        stage = attention_stage(kernel)
        out, kept = stage.forward({}, (q, k, v))
        grads, inputs = stage.backward({}, (q, k, v), kept, cotangent)
        assert grads == {}
        assert_trees_close((out, *inputs), (expected, *expected_grads), TOLERANCE[dtype])


def test_a_differentiable_kernel_runs_its_own_halves():
    calls = []

    def forward(q, k, v):
        calls.append("forward")
        return v, "saved"

    def backward(inputs, saved, cotangent):
        calls.append(saved)
        return cotangent, cotangent, cotangent

    stage = attention_stage(Differentiable(fn.causal_attention, forward, backward))
    q, k, v, g = heads(1, 1, 3, 2, torch.float32)
    out, kept = stage.forward({}, (q, k, v))
    assert out is v
    stage.backward({}, (q, k, v), kept, g)
    assert calls == ["forward", "saved"]
