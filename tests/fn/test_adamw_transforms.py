"""Derivatives of an update, by the formula and by differences of the fused update in float64."""

import pytest
import torch
from torch.func import grad, hessian, jvp, vmap

from rlm_mhc import fn
from rlm_mhc.testing import assert_trees_close
from rlm_mhc.tree import tree_map, tree_rows

DTYPE = torch.float64


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def case():
    params = {"w": draw(0, 3, 2), "b": draw(1, 4)}
    grads = {"b": draw(2, 4), "w": draw(3, 3, 2)}
    moments = [{"w": draw(4 + i, 3, 2), "b": draw(6 + i, 4)} for i in range(2)]
    state = fn.AdamWState(moments[0], tree_map(torch.square, moments[1]), torch.tensor(3.0))
    return params, grads, state, torch.tensor(0.02, dtype=DTYPE)


def updated(params, grads, state, lr, **options):
    return fn.adamw(params, grads, state, {"b": False, "w": True}, lr=lr, **options)


def value(*arguments, **options):
    """A number that every new value and moment is part of."""
    params, state = updated(*arguments, **options)
    trees = (params, state.exp_avg, state.exp_avg_sq)
    return sum((i + 1) * x.pow(3).sum() for i, tree in enumerate(trees) for x in (tree["w"], tree["b"]))


@pytest.mark.parametrize("options", [{}, {"grad_scale": torch.tensor(3.0)}, {"found_inf": torch.tensor(1.0)}])
def test_the_formula_and_the_fused_update_agree(options):
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
        *trees, lr = tree_map(lambda x: x.to(dtype) if x.dim() else x, case())  # noqa: B023
        fused = updated(*trees, lr, **options)
        recorded = updated(tree_map(lambda x: x.clone().requires_grad_(), trees[0]), *trees[1:], lr, **options)
        assert recorded[0]["w"].grad_fn is not None
        assert recorded[0]["w"].dtype == recorded[1].exp_avg["w"].dtype == dtype
        assert_trees_close(tree_map(torch.Tensor.detach, recorded), fused, tolerance)


@pytest.mark.parametrize("options", [{}, {"grad_scale": torch.tensor(3.0)}])
@pytest.mark.parametrize("place", range(5))
def test_the_gradient_by_each_input_is_that_of_differences(place, options):
    params, grads, state, lr = case()
    inputs = [params, grads, state.exp_avg, state.exp_avg_sq, {"lr": lr}]

    def at(moved):
        params, grads, m, v, rate = (*inputs[:place], moved, *inputs[place + 1 :])
        return value(params, grads, fn.AdamWState(m, v, state.step), rate["lr"], **options)

    direction = tree_map(lambda x: draw(x.numel(), *x.shape), inputs[place])
    up, down = (at(tree_map(lambda x, d, s=step: x + s * d, inputs[place], direction)) for step in (1e-5, -1e-5))
    product = sum((g * d).sum() for g, d in tree_rows(grad(at)(inputs[place]), direction))
    torch.testing.assert_close(product, (up - down) / 2e-5, rtol=1e-6, atol=1e-7)


def test_meta_learning_through_the_first_update():
    def loss(p, lr=0.1):
        (new,), _ = fn.adamw((p,), (2 * p,), fn.adamw_init((torch.ones_like(p),)), (False,), lr=lr)
        return new.square().sum()

    ones = torch.ones(2)
    torch.testing.assert_close(grad(loss)(ones), torch.tensor([1.8, 1.8]))
    leaf = torch.ones(2, requires_grad=True)
    torch.testing.assert_close(torch.autograd.grad(loss(leaf), leaf)[0], torch.tensor([1.8, 1.8]))
    # p - lr · sign(p): by lr it is Σ -2 · 0.9.
    torch.testing.assert_close(grad(loss, argnums=1)(ones, torch.tensor(0.1)), torch.tensor(-3.6))
    torch.testing.assert_close(hessian(loss)(ones.double()), 2 * torch.eye(2, dtype=DTYPE), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(jvp(loss, (ones,), (ones,))[1], torch.tensor(3.6))


def test_a_gradient_of_zero_has_a_finite_derivative():
    def new(g):
        return fn.adamw((torch.ones(1),), (g,), fn.adamw_init((torch.ones(1),)), (False,), lr=0.1, eps=0.5)[0][0].sum()

    # m / (sqrt(v) + eps) is g / (|g| + eps) at the first update.
    torch.testing.assert_close(grad(new)(torch.zeros(1)), torch.tensor([-0.1 / 0.5]))


def test_a_skipped_update_has_the_derivative_of_the_identity():
    def new(p, g):
        state = fn.adamw_init((torch.ones(1),))
        return fn.adamw((p,), (g,), state, (True,), lr=0.1, found_inf=torch.tensor(1.0))[0][0].sum()

    of_p, of_g = grad(new, argnums=(0, 1))(torch.ones(1), torch.full((1,), torch.inf))
    assert (of_p, of_g) == (1, 0)


def test_vmap_over_models_and_over_learning_rates():
    models = [tree_map(lambda x, k=k: x * k, case()) for k in (1.0, 2.0, 3.0)]
    stacked = tree_map(lambda *xs: torch.stack(xs), *models)
    each = vmap(updated)(*stacked)
    one_model = vmap(updated, in_dims=(None, None, None, 0))(*models[0][:3], stacked[3])
    for i, model in enumerate(models):
        assert_trees_close(tree_map(lambda x, i=i: x[i], each), updated(*model), 1e-14)
        own = updated(*models[0][:3], model[3])[0]
        assert_trees_close(tree_map(lambda x, i=i: x[i], one_model[0]), own, 1e-14)


def test_without_a_graph_nothing_is_recorded():
    params, grads, state, lr = case()
    leaves = tree_map(lambda x: x.clone().requires_grad_(), params)
    exact, _ = updated(params, grads, state, lr)
    with torch.no_grad():
        assert not updated(leaves, grads, state, lr)[0]["w"].requires_grad
    donated, _ = updated(leaves, grads, tree_map(torch.clone, state), lr, donate=True)
    assert donated["w"] is leaves["w"]
    assert donated["w"].is_leaf
    assert_trees_close(tree_map(torch.Tensor.detach, donated), exact, 0.0)
