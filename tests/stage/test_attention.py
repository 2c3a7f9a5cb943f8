import pytest
import torch
from torch.func import vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlm_mhc import fn
from rlm_mhc.stage import Stage, Staged
from rlm_mhc.stage.attention import PLAIN, SDPA, attention_stage
from rlm_mhc.testing import assert_as_accurate, assert_trees_close


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


@pytest.mark.parametrize(
    "kernel",
    [Staged(None, SDPA), Staged(None, PLAIN), fn.causal_attention, lambda q, k, v: fn.causal_attention(q, k, v)],
)
@pytest.mark.parametrize(("h", "kv", "s", "d"), [(4, 4, 7, 8), (4, 2, 1, 2), (6, 1, 33, 6)])
@pytest.mark.parametrize("transposed", [False, True])
def test_output_and_gradients_equal_the_formula(kernel, h, kv, s, d, transposed):
    for dtype in (torch.float64, torch.float32):
        q, k, v, cotangent = heads(h, kv, s, d, dtype, transposed)
        plain, exact = (
            reference(*inputs) for inputs in ((q, k, v, cotangent), map(torch.Tensor.double, (q, k, v, cotangent)))
        )
        stage = attention_stage(kernel)
        out, kept = stage.forward({}, (q, k, v))
        grads, inputs = stage.backward({}, (q, k, v), kept, cotangent)
        assert grads == {}
        assert_as_accurate((out, inputs), plain, exact)


def test_a_differentiable_kernel_runs_its_own_halves():
    calls = []

    def forward(weights, qkv):
        calls.append("forward")
        return qkv[2], "saved"

    def backward(weights, qkv, saved, cotangent):
        calls.append(saved)
        return {}, (cotangent, cotangent, cotangent)

    stage = attention_stage(Staged(fn.causal_attention, Stage(forward, backward)))
    q, k, v, g = heads(1, 1, 3, 2, torch.float32)
    out, kept = stage.forward({}, (q, k, v))
    assert out is v
    stage.backward({}, (q, k, v), kept, g)
    assert calls == ["forward", "saved"]


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize(("h", "kv", "s", "d"), [(4, 4, 128, 64), (4, 2, 33, 128), (6, 1, 7, 6), (2, 2, 65, 264)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 5e-3), (torch.float32, 1e-4)])
def test_gpu_kernels_equal_the_formula_in_float64(h, kv, s, d, dtype, tolerance):
    q, k, v, cotangent = (x.cuda().to(dtype) for x in heads(h, kv, s, d, torch.float32))
    expected, grads = reference(*(x.cpu().double() for x in (q, k, v, cotangent)))
    out, saved = SDPA.forward({}, (q, k, v))
    actual = (out, *SDPA.backward({}, (q, k, v), saved, cotangent)[1])
    assert_trees_close([x.cpu() for x in actual], [expected, *grads], tolerance)


@pytest.mark.gpu
@GPU
def test_gpu_flash_attn_package_equals_the_formula():
    pytest.importorskip("flash_attn", reason="the flash-attn package is not installed")
    from rlm_mhc.kernels.flash_attention import flash_attention

    q, k, v, cotangent = (x.cuda().bfloat16() for x in heads(4, 2, 65, 64, torch.float32))
    expected, grads = reference(*(x.cpu().double() for x in (q, k, v, cotangent)))
    out, saved = flash_attention.forward(q, k, v)
    actual = (out, *flash_attention.backward((q, k, v), saved, cotangent))
    assert_trees_close([x.cpu() for x in actual], [expected, *grads], 3e-2)
