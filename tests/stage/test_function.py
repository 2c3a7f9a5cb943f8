"""The derivatives of stages as functions; those that they do not have are errors, never zeros."""

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

from rlm_mhc.kernels.mix_pre import Settings
from rlm_mhc.kernels.selftest import ARGUMENTS, draw_inputs, fused
from rlm_mhc.kernels.sinkhorn import sinkhorn_knopp
from rlm_mhc.stage import Stage, as_function

MISSING = {
    "jvp": lambda f: lambda x: jvp(f, (x,), (x,))[1],
    "jvp of jvp": lambda f: lambda x: jvp(lambda x: jvp(f, (x,), (x,))[1], (x,), (x,))[1],
    "jvp of grad": lambda f: lambda x: jvp(grad(f), (x,), (x,))[1],
    "jvp of a cotangent": lambda f: lambda x: jvp(vjp(f, x)[1], (torch.ones(()),), (torch.ones(()),))[1],
    "grad of jvp": lambda f: grad(lambda x: jvp(f, (x,), (x,))[1]),
    "grad of grad": lambda f: grad(lambda x: grad(f)(x).square().sum()),
    "vmap of grad of grad": lambda f: vmap(grad(lambda x: grad(f)(x).square().sum())),
    "grad of vmap of grad": lambda f: grad(lambda x: vmap(grad(f))(x).square().sum()),
    "jacrev of jacrev": lambda f: jacrev(jacrev(f)),
    "jacfwd of jacrev": lambda f: jacfwd(jacrev(f)),
}
COMPILED = ("jvp", "jvp of grad", "grad of jvp", "grad of grad", "vmap of grad of grad")


def losses(device):
    """Each fused function as a loss of its first argument, `[2, *b]`."""

    def loss(name):
        x, *rest = draw_inputs(name, 2, 16, 2, torch.float32, device).values()
        run = fused(name, Settings(2, 1e-6, 0.0))
        # Under vmap `x` has no axis of tokens.
        per_token = [key not in ("phi", "alpha", "bias", "weight") for key in ARGUMENTS[name][1:]]

        def of(x):
            alone = x.dim() == 2
            others = [y[:1] if alone and own else y for y, own in zip(rest, per_token, strict=True)]
            return sum(y.float().square().sum() for y in run(x[None] if alone else x, *others))

        return of, x

    return {name: loss(name) for name in ARGUMENTS} | {
        "sinkhorn_knopp": (lambda x: sinkhorn_knopp(x, num_iters=2).square().sum(), torch.randn(2, 3, 3, device=device))
    }


@pytest.mark.parametrize("transform", MISSING)
@pytest.mark.parametrize("name", [*ARGUMENTS, "sinkhorn_knopp"])
def test_second_derivatives_and_forward_mode_are_errors(name, transform, device):
    loss, x = losses(device)[name]
    assert grad(loss)(x).abs().max() > 0
    with pytest.raises(RuntimeError, match=f"no second derivatives and no forward mode.*: {name}"):
        MISSING[transform](loss)(x)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("transform", COMPILED)
@pytest.mark.parametrize("name", ["mix_post", "sinkhorn_knopp"])
def test_compiled_too(name, transform, device):
    loss, x = losses(device)[name]
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.compile(MISSING[transform](loss), backend="eager", fullgraph=True)(x)


def scaled_cube(weights, x):
    return weights["a"] * x**3, (x**2,)


def tripled_derivative(weights, x, residuals, g):
    (square,) = residuals
    return {"a": 3 * g * x**3}, 3 * g * 3 * weights["a"] * square


CUBE = Stage(scaled_cube, tripled_derivative)


def test_its_gradient_is_that_of_the_backward_for_weights_and_input(gradient_of):
    a, x = torch.tensor(2.0), torch.tensor(0.5)
    run = as_function(CUBE, "cube")
    torch.testing.assert_close(gradient_of(lambda x: run({"a": a}, x), x), 3 * 3 * a * x**2)
    torch.testing.assert_close(gradient_of(lambda a: run({"a": a}, x), a), 3 * x**3)


def test_of_several_outputs_those_that_the_backward_reads_are_saved_once():
    def backward(weights, x, residuals, cotangents):
        exp, _, other = residuals
        return {}, (cotangents[0] * exp + 2 * cotangents[1], cotangents[1] * other)

    def forward(weights, x):
        outputs = x[0].exp(), 2 * x[0] + 5 * x[1]
        return outputs, (*outputs, torch.full_like(x[1], 5.0))

    run = as_function(Stage(forward, backward), "pair", outputs=2, reads_outputs=True)
    x, y, g = torch.randn(3), torch.randn(3), (torch.randn(3), torch.randn(3))
    (exp, line), pull = torch.func.vjp(lambda x, y: run({}, (x, y)), x, y)
    torch.testing.assert_close((exp, line), (x.exp(), 2 * x + 5 * y))
    torch.testing.assert_close(pull(g), (g[0] * x.exp() + 2 * g[1], 5 * g[1]))


@pytest.mark.parametrize("in_dims", [(None, 0), (0, 0), (0, None)])
def test_under_vmap_a_stage_with_weights_runs_for_each_element(in_dims):
    calls, a, x = [], torch.rand(4), torch.rand(4)
    counted = CUBE._replace(forward=lambda weights, x: calls.append(x.shape) or scaled_cube(weights, x))
    run = as_function(counted, "cube")
    own = [v if axis == 0 else v[0] for v, axis in zip((a, x), in_dims, strict=True)]
    actual = vmap(grad(lambda a, x: run({"a": a}, x), argnums=(0, 1)), in_dims=in_dims)(*own)
    a, x = (v.expand(4) for v in own)
    torch.testing.assert_close(actual, (3 * x**3, 9 * a * x**2))
    assert calls == [()] * 4


@pytest.mark.parametrize("axis", [0, 1])
def test_under_vmap_a_stage_without_weights_runs_once(axis):
    calls, x = [], torch.rand(4, 4)

    def forward(weights, x):
        calls.append(x.shape)
        return x**2, ()

    square = Stage(forward, lambda weights, x, residuals, g: ({}, 7 * g * x))
    run = as_function(square, "square")
    actual = vmap(grad(lambda x: run({}, x).sum()), in_dims=axis, out_dims=axis)(x)
    torch.testing.assert_close(actual, 7 * x)
    assert calls == [(4, 4)]
