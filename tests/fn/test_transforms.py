"""The reference functions under torch.func and torch.compile."""

import pytest
import torch
from torch.func import grad, grad_and_value, jacfwd, jacrev, jvp, vmap

from rlm_mhc import fn
from rlm_mhc.testing import assert_as_accurate, assert_trees_close, random_batch, small_config
from rlm_mhc.testing.models import double
from rlm_mhc.testing.strategies import BIRKHOFF
from rlm_mhc.tree import named_leaves, tree_leaves, tree_map
from rlm_mhc.variants import PROJECTIONS


def plain_autograd(params, batch, config):
    leaves = tree_map(lambda w: w.clone().requires_grad_(), params)
    value = fn.loss(leaves, batch, config)
    return tree_map(lambda w: w, value.detach()), dict(
        zip(named_leaves(leaves), torch.autograd.grad(value, tree_leaves(leaves)), strict=True)
    )


def float64(config, seed=0):
    params = fn.init(config, seed=seed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    return tree_map(lambda w: w + 0.05 * torch.randn(w.shape, generator=generator, dtype=w.dtype), params)


@pytest.mark.parametrize("mhc", [True, False])
def test_grad_and_value_equals_plain_autograd(mhc):
    config = small_config(mhc_enabled=mhc)
    params, batch = float64(config), random_batch(config, 2, 7, ignored=0.3)
    grads, value = grad_and_value(fn.loss)(params, batch, config)
    expected_value, expected = plain_autograd(params, batch, config)
    assert value == expected_value
    assert_trees_close(named_leaves(grads), expected, 1e-12)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_of_grad_gives_the_gradient_of_each_example():
    config = small_config(num_layers=1)
    params, batch = float64(config), random_batch(config, 3, 5, ignored=0.3)
    each = vmap(grad(fn.loss), in_dims=(None, 0, None))(params, batch, config)
    for i in range(3):
        one = grad(fn.loss)(params, fn.Batch(batch.tokens[i], batch.targets[i]), config)
        assert_trees_close(tree_map(lambda g, i=i: g[i], each), one, 1e-11)


@pytest.mark.parametrize("mhc", [True, False])
def test_jvp_is_the_product_of_gradient_and_tangent(mhc):
    config = small_config(mhc_enabled=mhc)
    params, batch = float64(config), random_batch(config, 2, 7)
    tangent = float64(config, seed=1)
    value, slope = jvp(lambda p: fn.loss(p, batch, config), (params,), (tangent,))
    grads, expected = grad_and_value(fn.loss)(params, batch, config)
    product = sum((g * t).sum() for g, t in zip(tree_leaves(grads), tree_leaves(tangent), strict=True))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(slope, product, rtol=1e-10, atol=0)


def test_forward_over_reverse_gives_the_hessian_product():
    config = small_config(num_layers=1)
    params, batch, tangent = float64(config), random_batch(config, 2, 7), float64(config, seed=1)
    _, product = jvp(lambda p: grad(fn.loss)(p, batch, config), (params,), (tangent,))
    step = 1e-6
    up, down = (
        grad(fn.loss)(tree_map(lambda w, t, s=sign: w + s * step * t, params, tangent), batch, config)
        for sign in (1, -1)
    )
    expected = tree_map(lambda a, b: (a - b) / (2 * step), up, down)
    assert_trees_close(product, expected, 1e-4, floor=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("no_shape_checks")
def test_one_compiled_graph_of_loss_and_gradient_agrees():
    config = small_config(num_layers=1, mhc_flows=2, mhc_sinkhorn_iters=3)
    params, batch = fn.init(config), random_batch(config, 2, 8, ignored=0.3)
    compiled = torch.compile(lambda p, b: grad_and_value(fn.loss)(p, b, config), fullgraph=True)
    grads, value = compiled(params, batch)
    (plain, plain_value), (exact, exact_value) = (
        grad_and_value(fn.loss)(p, batch, config) for p in (params, double(params))
    )
    assert_as_accurate(value, plain_value, exact_value)
    assert_as_accurate(grads, plain, exact)


@pytest.mark.slow
@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_compiled_gradients_per_example_and_directional_derivatives_agree():
    config = small_config(num_layers=1, mhc_flows=2, mhc_sinkhorn_iters=2)
    params, batch, tangent = fn.init(config), random_batch(config, 2, 8, ignored=0.3), fn.init(config, seed=1)

    def each(params, batch):
        return vmap(grad(fn.loss), in_dims=(None, 0, None))(params, batch, config)

    def slope(params, tangent):
        return jvp(lambda p: fn.loss(p, batch, config), (params,), (tangent,))

    for function, arguments in ((each, (params, batch)), (slope, (params, tangent))):
        plain, exact = function(*arguments), function(*double(arguments))
        actual = torch.compile(function, fullgraph=True)(*arguments)
        assert_as_accurate(actual, plain, exact)


def test_loss_counts_only_counted_targets():
    config = small_config()
    params, batch = fn.init(config), random_batch(config, 2, 7, ignored=0.5)
    logits = fn.forward(params, batch.tokens, config)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    torch.testing.assert_close(fn.loss(params, batch, config), expected)
    nothing = fn.Batch(batch.tokens, torch.full_like(batch.targets, -100))
    assert fn.loss(params, nothing, config) == 0


def test_a_sequence_longer_than_the_model_is_refused():
    config = small_config(max_seq_len=4)
    with pytest.raises(ValueError, match="max_seq_len=4"):
        fn.forward(fn.init(config), torch.zeros(1, 5, dtype=torch.int64), config)


def test_parameters_of_another_kind_are_refused():
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    for mhc in (True, False):
        with pytest.raises(ValueError, match="mhc_enabled"):
            fn.forward(fn.init(small_config(mhc_enabled=mhc)), tokens, small_config(mhc_enabled=not mhc))


def test_kernels_are_an_argument():
    config, calls = small_config(), []

    def counting(q, k, v):
        calls.append(q.shape)
        return fn.causal_attention(q, k, v)

    params, tokens = fn.init(config), torch.zeros(1, 5, dtype=torch.int64)
    out = fn.forward(params, tokens, config, fn.REFERENCE._replace(attention=counting))
    assert len(calls) == config.num_layers
    torch.testing.assert_close(out, fn.forward(params, tokens, config))


def textbook_sinkhorn(logits, iterations, eps=0.0):
    m = logits.softmax(-2) + eps
    m = m / (m.sum(-1, keepdim=True) + eps)
    for _ in range(iterations - 1):
        m = m / (m.sum(-2, keepdim=True) + eps)
        m = m / (m.sum(-1, keepdim=True) + eps)
    return m


def textbook_attention(q, k, v):
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf")).softmax(-1) @ v


# The implicit gradient is that of the limit, of which these iterations fall short by rounding alone.
WITH_THEIR_OWN_DERIVATIVES = {
    "sinkhorn": (lambda x: fn.sinkhorn_knopp(x, num_iters=3), lambda x: textbook_sinkhorn(x, 3)),
    "sinkhorn with eps": (
        lambda x: fn.sinkhorn_knopp(x, num_iters=3, eps=0.1),
        lambda x: textbook_sinkhorn(x, 3, 0.1),
    ),
    "implicit sinkhorn": (lambda x: fn.sinkhorn_implicit(x, num_iters=60), lambda x: textbook_sinkhorn(x, 60)),
    "attention": (
        lambda x: fn.causal_attention(x, x.sin(), x.cos()),
        lambda x: textbook_attention(x, x.sin(), x.cos()),
    ),
}
SECOND_DERIVATIVES = {
    "jvp of jvp": lambda f: lambda x: jvp(lambda y: jvp(f, (y,), (x,))[1], (x,), (x.mT,))[1],
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(f)),
    "jacfwd of jacrev": lambda f: jacfwd(jacrev(f)),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(f)),
    "jacrev of jacrev": lambda f: jacrev(jacrev(f)),
    "grad of jvp of jvp": lambda f: grad(lambda x: jvp(lambda y: jvp(f, (y,), (y,))[1], (x,), (x.mT,))[1]),
    "vmap of jacfwd of jacfwd": lambda f: lambda x: vmap(jacfwd(jacfwd(f)))(torch.stack([x, x.mT])),
}


@pytest.mark.parametrize("transform", SECOND_DERIVATIVES)
@pytest.mark.parametrize("name", WITH_THEIR_OWN_DERIVATIVES)
def test_second_derivatives_equal_those_of_the_textbook_formula(name, transform):
    if name == "attention" and transform == "jacrev of jacrev":
        pytest.skip("PyTorch's fused attention has no double backward, which is its error")
    weight, x = torch.randn(2, 1, 3, 3, dtype=torch.float64).unbind()
    ours, expected = (
        SECOND_DERIVATIVES[transform](lambda x, f=f: (f(x) * weight).sum())(x) for f in WITH_THEIR_OWN_DERIVATIVES[name]
    )
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=0)


@pytest.mark.usefixtures("no_shape_checks")
def test_implicit_sinkhorn_in_compiled_forward_mode_is_an_error_and_not_the_derivative_of_the_iterations():
    x = torch.eye(3)
    run = torch.compile(lambda x: jvp(fn.sinkhorn_implicit, (x,), (x,))[1], backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="sinkhorn_implicit in forward mode"):
        run(x)


@pytest.mark.parametrize("projection", BIRKHOFF)
def test_every_order_of_transforms_has_the_same_second_derivatives_of_a_projection(projection):
    size = PROJECTIONS[projection].raw_size(2)
    weight, raw = torch.randn(1, 2, 2, dtype=torch.float64), torch.randn(1, size, dtype=torch.float64)

    def loss(raw):
        return (fn.project(raw, 2, projection, num_iters=3) * weight).sum()

    reverse = jacrev(jacrev(loss))(raw)
    for outer, inner in ((jacfwd, jacfwd), (jacfwd, jacrev), (jacrev, jacfwd)):
        torch.testing.assert_close(outer(inner(loss))(raw), reverse, atol=1e-10, rtol=0)
        each = vmap(outer(inner(loss)))(torch.stack([raw, raw]))
        torch.testing.assert_close(each, torch.stack([reverse, reverse]), atol=1e-10, rtol=0)
