"""The fused ops and their gradients, in Triton's interpreter or on a GPU, equal formulas written out in float64."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import einsum, sigmoid

from rlm_mhc.kernels.mix_pre import Settings
from rlm_mhc.kernels.selftest import ARGUMENTS, OUTPUTS, draw_inputs, fused
from rlm_mhc.testing import assert_as_accurate
from rlm_mhc.variants import PRESETS

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SINKHORN_EPS = (*sorted({row.eps for row in PRESETS.values()}), 0.05)  # the last is none that rounding hides


def doubly_stochastic(logits, iters, eps):
    """Divide columns by their sums, then rows, `iters` times; `eps` is added to all but the first columns."""
    m = logits.exp()
    m = m / einsum("tij->tj", m)[:, None, :] + eps
    m = m / (einsum("tij->ti", m)[:, :, None] + eps)
    for _ in range(iters - 1):
        m = m / (einsum("tij->tj", m)[:, None, :] + eps)
        m = m / (einsum("tij->ti", m)[:, :, None] + eps)
    return m


def mappings(x, phi, alpha, bias, s):
    """`h = v · phi / rms(v)`, `pre = σ(α₀ h + b) + eps`, `post = 2 σ(α₁ h + b)`, `res` by Sinkhorn of `α₂ h + b`."""
    tokens, n, _ = x.shape
    v = x.flatten(1)
    h = einsum("tk,km->tm", v, phi) / (einsum("tk,tk->t", v, v) / v.shape[1] + s.eps).sqrt()[:, None]
    h = h * torch.cat([alpha[0].expand(n), alpha[1].expand(n), alpha[2].expand(n * n)]) + bias
    res = doubly_stochastic(h[:, 2 * n :].reshape(tokens, n, n), s.num_iters, s.sinkhorn_eps)
    return sigmoid(h[:, :n]) + s.sinkhorn_eps, 2 * sigmoid(h[:, n : 2 * n]), res


def formula(name, s, *inputs):
    """The outputs of an op, in the dtype of its inputs."""
    a = dict(zip(ARGUMENTS[name], inputs, strict=True))
    x, found = a["streams"], {}

    def combine(post, res):
        return einsum("tij,tjc->tic", res, x) + einsum("ti,tc->tic", post, a["output"])

    if "post" in a:
        x = found["mixed"] = combine(a["post"], a["res"])
    if "phi" in a:
        found["pre"], found["post"], found["res"] = mappings(x, a["phi"], a["alpha"], a["bias"], s)
        u = einsum("ti,tic->tc", a.get("given", found["pre"]), x)
        found["normed"] = u / (einsum("tc,tc->t", u, u) / u.shape[1] + s.eps).sqrt()[:, None] * a["weight"]
    if "output" in a and "post" not in a:
        found["mixed"] = combine(found["post"], found["res"])
    return tuple(found[key] for key in OUTPUTS[name])


def with_gradients(run, inputs, cotangents):
    outputs, vjp = torch.func.vjp(run, *inputs)
    return outputs, vjp(tuple(g.to(y.dtype) for g, y in zip(cotangents, outputs, strict=True)))


@settings(max_examples=max(12, settings.default.max_examples // 5))  # the interpreter takes its time
@given(
    name=st.sampled_from(sorted(ARGUMENTS)),
    n=st.sampled_from([1, 2, 3, 4, 11]),
    c=st.sampled_from([16, 48]),
    tokens=st.integers(1, 5),
    iters=st.integers(1, 4),
    eps=st.sampled_from([1e-6, 0.3]),
    sinkhorn_eps=st.sampled_from(SINKHORN_EPS),
    seed=st.integers(0, 2**16),
)
def test_fused_ops_and_their_gradients_are_the_formulas(name, n, c, tokens, iters, eps, sinkhorn_eps, seed):
    s = Settings(iters, eps, sinkhorn_eps)
    inputs = list(draw_inputs(name, n, c, tokens, torch.float32, DEVICE, seed).values())
    run = partial(formula, name, s)
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(y.shape, generator=generator).to(DEVICE) for y in run(*inputs)]
    fused_, plain, exact = (
        with_gradients(f, x, cotangents)
        for f, x in ((fused(name, s), inputs), (run, inputs), (run, [x.double() for x in inputs]))
    )
    # A gradient that is zero, as that of a single stream's scale, which the norm takes away, is rounding of cotangents.
    assert_as_accurate(fused_, plain, exact, factor=8, floor=1.0)
