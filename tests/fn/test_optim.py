from itertools import pairwise

import pytest
import torch

from rlm_mhc import fn
from rlm_mhc.testing import assert_trees_close
from rlm_mhc.tree import tree_map


def trees(seed):
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(3, 4, generator=generator), "b": torch.randn(4, generator=generator)}


def test_adamw_equals_torch_optim():
    params, decay = trees(0), {"w": True, "b": False}
    modules = {k: torch.nn.Parameter(v.clone()) for k, v in params.items()}
    groups = [{"params": [modules["w"]], "weight_decay": 0.3}, {"params": [modules["b"]], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), eps=1e-6)
    state = fn.adamw_init(params)
    for step in range(1, 6):
        grads = trees(step)
        for name, module in modules.items():
            module.grad = grads[name].clone()
        theirs.step()
        params, state = fn.adamw(
            params, grads, state, decay, lr=torch.tensor(0.01), betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3
        )
    assert_trees_close(params, {k: v.detach() for k, v in modules.items()}, 1e-6)
    assert state.step == 5


def test_adamw_is_pure_unless_donated():
    params, grads, decay = trees(0), trees(1), {"w": True, "b": False}
    state = fn.adamw_init(params)
    before = tree_map(torch.clone, (params, grads, state))
    new, _ = fn.adamw(params, grads, state, decay, lr=0.1)
    assert_trees_close((params, grads, state), before, 0.0)
    donated, _ = fn.adamw(params, grads, state, decay, lr=0.1, donate=True)
    assert donated["w"] is params["w"]
    assert_trees_close(donated, new, 0.0)


def test_clipping():
    grads = trees(0)
    norm = torch.cat([g.flatten() for g in grads.values()]).norm()
    clipped, measured = fn.clip_by_global_norm(grads, 0.5)
    torch.testing.assert_close(measured, norm)
    torch.testing.assert_close(fn.global_norm(clipped), torch.tensor(0.5))
    same, _ = fn.clip_by_global_norm(grads, 1e6)
    assert_trees_close(same, grads, 0.0)
    with pytest.raises(ValueError, match=r"max_norm=0\.0"):
        fn.clip_by_global_norm(grads, 0.0)


def test_schedule_warms_up_peaks_and_decays():
    def rate(t):
        return fn.cosine_schedule(t, lr=2.0, warmup_steps=10, max_steps=110, min_lr_ratio=0.25).item()

    assert rate(0) == pytest.approx(0.2)
    assert rate(9) == pytest.approx(2.0)
    assert rate(59) == pytest.approx(0.5 + 1.5 / 2, rel=1e-3)
    assert rate(109) == pytest.approx(0.5)
    assert rate(10**6) == pytest.approx(0.5)
    rates = [rate(t) for t in range(9, 110)]
    assert all(a >= b for a, b in pairwise(rates))


def test_schedule_without_warmup_and_on_a_tensor():
    assert fn.cosine_schedule(torch.tensor(0), lr=1.0, warmup_steps=0, max_steps=1).item() == pytest.approx(0.1)


def test_a_pure_update_leaves_scaled_gradients_alone():
    params, grads = (torch.ones(3),), (torch.full((3,), 8.0),)
    fn.adamw(params, grads, fn.adamw_init(params), (False,), lr=0.1, grad_scale=torch.tensor(4.0))
    assert torch.equal(grads[0], torch.full((3,), 8.0))


def test_found_inf_leaves_everything_as_it_was():
    params, grads = (torch.ones(3),), (torch.full((3,), torch.inf),)
    state = fn.adamw_init(params)
    after, same = fn.adamw(
        params, grads, state, (True,), lr=0.1, found_inf=torch.tensor(1.0), grad_scale=torch.tensor(2.0)
    )
    assert torch.equal(after[0], params[0])
    assert same.step == 0
