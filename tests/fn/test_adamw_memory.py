"""`fn.adamw` of leaves of any layout, against torch.optim.AdamW, which is given contiguous copies."""

import itertools

import pytest
import torch
from torch import nn

from rlm_mhc import fn
from rlm_mhc.testing import assert_trees_close
from rlm_mhc.tree import tree_map

LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "transposed": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: torch.stack([x, torch.full_like(x, 7.0)], -1)[..., 0],
    "sliced": lambda x: torch.cat([torch.full_like(x, 7.0), x], 1)[:, x.shape[1] :],
    "expanded": lambda x: x[:, :1].expand(x.shape),
}
OPTIONS = dict(lr=0.03, betas=(0.8, 0.9), eps=1e-6)
SHAPE = (5, 6)


def draw(seed, dtype):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def expected(values, all_grads, scale):
    """The weights and moments by torch.optim.AdamW after updates with these gradients divided by the scale."""
    modules = {name: nn.Parameter(x.clone(memory_format=torch.contiguous_format)) for name, x in values.items()}
    decays = {"w": 0.3, "b": 0.0}
    groups = [{"params": [p], "weight_decay": decays[name]} for name, p in modules.items()]
    optimizer = torch.optim.AdamW(groups, foreach=False, **OPTIONS)
    for grads in all_grads:
        for name, p in modules.items():
            p.grad = (grads[name] / scale).contiguous()
        optimizer.step()
    moments = [{name: optimizer.state[p][key] for name, p in modules.items()} for key in ("exp_avg", "exp_avg_sq")]
    return {name: p.detach() for name, p in modules.items()}, *moments


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_any_layout_of_weights_gradients_and_moments_is_as_a_contiguous_one(dtype, tolerance, donate, scaled):
    scale = 4.0 if scaled else 1.0
    for of_weight, of_grad, of_moment in itertools.product(LAYOUTS, repeat=3):
        if donate and "expanded" in (of_weight, of_moment):
            continue  # several entries in one place of memory: refused below
        weight, grad, moment = (LAYOUTS[name] for name in (of_weight, of_grad, of_moment))
        params = {"w": weight(draw(0, dtype)), "b": weight(draw(1, dtype))}
        all_grads = [{name: grad(draw(2 * step + i, dtype)) for i, name in enumerate("bw")} for step in (1, 2)]
        given = tree_map(torch.clone, params)
        exact = expected(given, [tree_map(torch.clone, grads) for grads in all_grads], scale)
        state = tree_map(lambda x: moment(x) if x.dim() else x, fn.adamw_init(params))  # noqa: B023
        before = params
        for grads in all_grads:
            scaling = {"grad_scale": torch.tensor(scale)} if scaled else {}
            params, state = fn.adamw(
                params, grads, state, {"b": False, "w": True}, weight_decay=0.3, donate=donate, **OPTIONS, **scaling
            )
        assert_trees_close((params, state.exp_avg, state.exp_avg_sq), exact, tolerance)
        if donate:
            assert params["w"] is before["w"]
        else:
            assert all(torch.equal(before[name], given[name]) for name in given)


def test_expanded_gradients_of_autograd_are_taken_as_they_are():
    x, w = draw(0, torch.float64), draw(1, torch.float64)
    loose = torch.func.grad(lambda w: torch.einsum("bc,dc->bd", x, w).sum())(w)
    bias = torch.func.grad(lambda b: b.sum())(draw(2, torch.float64))
    assert bias.stride() == (0, 0)
    params = {"w": w, "b": draw(2, torch.float64)}
    exact = expected(params, [{"w": loose, "b": bias}], 1.0)
    for donate in (False, True):
        own = tree_map(torch.clone, params)
        new, state = fn.adamw(
            own, {"b": bias, "w": loose}, fn.adamw_init(own), {"b": False, "w": True},
            weight_decay=0.3, donate=donate, **OPTIONS,
        )  # fmt: skip
        assert_trees_close((new, state.exp_avg, state.exp_avg_sq), exact, 1e-14)


@pytest.mark.parametrize(
    ("part", "wrong", "message"),
    [
        ("grads", lambda x: x[:2], r"grads of 'layer\.w' torch\.float32 \[2, 4\]: expected float32 \[3, 4\]"),
        ("grads", lambda x: x.mT, r"grads of 'layer\.w' torch\.float32 \[4, 3\]: expected float32 \[3, 4\]"),
        ("grads", lambda x: x.double(), r"grads of 'layer\.w' torch\.float64 \[3, 4\]: expected float32"),
        ("exp_avg", lambda x: x.flatten(), r"exp_avg of 'layer\.w' torch\.float32 \[12\]"),
        ("exp_avg_sq", lambda x: x.bfloat16(), r"exp_avg_sq of 'layer\.w' torch\.bfloat16"),
        ("grads", lambda x: x.to("meta"), r"grads of 'layer\.w' is on meta: expected cpu"),
    ],
)
def test_a_gradient_or_moment_of_another_size_dtype_or_device_is_named(part, wrong, message):
    params = {"b": torch.ones(2), "layer": {"w": torch.ones(3, 4)}}
    trees = {"grads": params, "exp_avg": params, "exp_avg_sq": params}
    trees[part] = {"layer": {"w": wrong(params["layer"]["w"])}, "b": params["b"]}
    state = fn.AdamWState(trees["exp_avg"], trees["exp_avg_sq"], torch.tensor(0.0))
    for donate in (False, True):
        with pytest.raises(ValueError, match=message):
            fn.adamw(params, trees["grads"], state, {"b": False, "layer": {"w": True}}, lr=0.1, donate=donate)


def update(params, grads=None, state=None, **options):
    state = fn.adamw_init(params) if state is None else state
    grads = tree_map(torch.ones_like, params) if grads is None else grads
    return fn.adamw(params, grads, state, tree_map(lambda x: True, params), lr=0.1, **options)


def test_what_is_updated_in_place_must_not_share_memory():
    x, other = torch.arange(12.0).view(3, 4), torch.ones(12)
    shared = [
        ((x, x), "params of '0' and params of '1'"),
        ((x, x.view(4, 3)), "params of '0' and params of '1'"),
        ((x.flatten()[:7], other, x.flatten()[6:]), "params of '0' and params of '2'"),
        ((x[:, ::2], x[:, 2:]), "params of '0' and params of '1'"),
        ((x, other.view(3, 4), x.mT), "params of '0' and params of '2'"),
        ((torch.ones(1).expand(3),), "params of '0' and params of '0'"),
        ((torch.ones(10).as_strided((4, 4), (2, 1)),), "params of '0' and params of '0'"),
    ]
    for params, message in shared:
        with pytest.raises(ValueError, match=f"{message} share memory, and donate=True"):
            update(params, donate=True)
        copies = tuple(p.clone() for p in params)
        assert_trees_close(update(params)[0], update(copies)[0], 0.0)
    with pytest.raises(ValueError, match="params of '0' and grads of '0' share memory"):
        update((x,), grads=(x,), donate=True)
    moments = (torch.zeros(3, 4),)
    with pytest.raises(ValueError, match="exp_avg of '0' and exp_avg_sq of '0' share memory"):
        update((x,), state=fn.AdamWState(moments, moments, torch.tensor(0.0)), donate=True)
    with pytest.raises(ValueError, match="exp_avg_sq of '0' and grads of '0' share memory"):
        update((x,), grads=moments, state=fn.AdamWState((other.view(3, 4),), moments, torch.tensor(0.0)), donate=True)


def test_parts_of_one_vector_and_columns_of_one_matrix_are_updated_in_place():
    vector, matrix = torch.arange(12.0), torch.arange(24.0).view(4, 6)
    own = (vector[:5], vector[5:], matrix[:, ::2], matrix[:, 1::2])
    exact, _ = update(tuple(p.clone() for p in own))
    update(own, donate=True)
    assert_trees_close(own, exact, 0.0)


@pytest.mark.parametrize("donate", [False, True])
def test_one_gradient_may_serve_two_leaves(donate):
    g = torch.full((3,), 8.0)
    exact, _ = update((torch.ones(3), torch.ones(3)), (g / 4, g / 4))
    new, _ = update((torch.ones(3), torch.ones(3)), (g, g), grad_scale=torch.tensor(4.0), donate=donate)
    assert_trees_close(new, exact, 1e-6)


def test_tensors_without_memory_and_none_at_all_are_updated():
    meta = (torch.ones(3, device="meta"), torch.ones(2, device="meta"))
    assert [p.shape for p in update(meta, donate=True)[0]] == [(3,), (2,)]
    assert update((torch.ones(0), torch.ones(0)), donate=True)[0][1].shape == (0,)
