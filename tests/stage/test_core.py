from functools import partial

import pytest
import torch

from rlm_mhc.stage import Staged, bring_stage, chain, pullback, recompute, residual, stage, stage_of
from rlm_mhc.testing import assert_trees_close

WEIGHTS = {"a": torch.randn(3, 3, dtype=torch.float64), "b": torch.randn(3, dtype=torch.float64), "c": torch.ones(3)}


def linear(a, x):
    return x @ a.T


def shift(b, c, pair):
    return pair[0] * b + c, pair[1] ** 2


def split(x):
    return x.sin(), x.cos()


def join(pair):
    return pair[0] * pair[1]


def whole(a, b, c, x):
    return x + join(shift(b, c, split(linear(a, x))))


def build(wrap=lambda s: s):
    parts = [stage(linear, "a"), stage(split), stage(shift, "b", constants=("c",)), stage(join)]
    return residual(chain(*map(wrap, parts)))


@pytest.mark.parametrize("make", [build, lambda: recompute(build()), lambda: build(recompute)])
def test_a_chain_has_the_gradient_of_the_whole(make):
    x, g = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    a, b, c = WEIGHTS["a"], WEIGHTS["b"], WEIGHTS["c"]
    expected, pull = torch.func.vjp(lambda a, b, x: whole(a, b, c, x), a, b, x)
    ga, gb, gx = pull(g)
    s = make()
    y, kept = s.forward(WEIGHTS, x)
    grads, cotangent = s.backward(WEIGHTS, x, kept, g)
    assert_trees_close((y, grads, cotangent), (expected, {"a": ga, "b": gb}, gx), 1e-13)


def test_recompute_keeps_nothing_and_a_chain_its_inner_inputs():
    x = torch.randn(5, 3, dtype=torch.float64)
    assert recompute(build()).forward(WEIGHTS, x)[1] == ()
    inner, _ = build().forward(WEIGHTS, x)[1]
    assert_trees_close(inner[0], linear(WEIGHTS["a"], x), 0.0)
    assert len(inner) == 3


class Tripled(torch.autograd.Function):
    """A product whose backward triples: were it dropped for the derivative of the forward, the three would go."""

    @staticmethod
    def forward(x, w):
        return x * w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return 3 * g * w, 3 * g * x


@pytest.mark.parametrize("compiled", [False, True])
def test_a_kernel_keeps_its_own_backward(compiled):
    x, w, g = torch.randn(4), torch.randn(4), torch.randn(4)

    def grads(x, w, g):
        return pullback(lambda x, w: Tripled.apply(x, w), x, w)[1](g)

    run = torch.compile(grads, fullgraph=True) if compiled else grads
    assert_trees_close(run(x, w, g), (3 * g * w, 3 * g * x), 1e-6)


def test_a_function_brings_its_stage_and_a_partial_that_of_its_function():
    def double(x, *, by=2):
        return by * x

    own = stage(double)
    assert stage_of(double) is None
    assert stage_of(Staged(double, own)) is own
    assert Staged(double, own)(3) == 6
    bring_stage(double, own)
    assert stage_of(double) is own
    assert stage_of(partial(partial(double))) is own
    assert stage_of(partial(double, by=3)) is None
    assert stage_of(partial(double, by=3), overridden=("by",)) is own
    assert stage_of(partial(double, 1.0), overridden=("by",)) is None
