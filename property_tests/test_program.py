"""The program of stages computes the gradient of `fn.loss`, however the work is cut."""

import math

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from rlm_mhc import TrainConfig, fn
from rlm_mhc.program import make_train_step
from rlm_mhc.program.decode import DECODING
from rlm_mhc.program.gradients import make_gradients
from rlm_mhc.program.state import resume_train_state
from rlm_mhc.testing import assert_as_accurate, random_batch, ranks_in_threads
from rlm_mhc.testing.models import perturbed, with_entry
from rlm_mhc.testing.strategies import configs
from rlm_mhc.tree import named_leaves, tree_map


@given(
    config=st.one_of(configs(), configs(mhc_enabled=True, mhc_preset="single_pass")),
    remat=st.sampled_from(["none", "mhc", "full"]),
    ranks=st.sampled_from([1, 2]),
    accumulation=st.integers(1, 3),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_program_gradients_equal_those_of_the_loss(config, remat, ranks, accumulation, dtype):
    remat = "none" if remat == "mhc" and not config.mhc_enabled else remat
    exact = perturbed(fn.init(config, dtype=torch.float64))
    params = tree_map(lambda w: w.to(dtype), exact)
    batch = random_batch(config, 2 * ranks * accumulation, 7, ignored=0.3)
    (plain, plain_value), (expected, value) = (
        torch.func.grad_and_value(fn.loss)(p, batch, config) for p in (params, exact)
    )
    scale = 1 / fn.count_targets(batch.targets).clamp(min=1).to(dtype)

    def run(rank, reduce):
        own = [
            fn.Batch(*pair) for pair in zip(*(x.view(accumulation, ranks, 2, -1)[:, rank] for x in batch), strict=True)
        ]
        gradients = make_gradients(config, fn.REFERENCE, remat=remat, reduce=reduce if ranks > 1 else None)
        return gradients(params, own, scale)

    results = ranks_in_threads(ranks, run)
    loss = sum(result.loss for result in results)
    assert_as_accurate(loss, plain_value, value)
    for result in results:
        # Float64 finds faults; in float32 the worst of many random models is to pass.
        assert_as_accurate(result.grads, plain, expected, factor=8)


@given(
    config=configs(num_layers=1),
    kernels=st.sampled_from([fn.REFERENCE, DECODING]),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    data=st.data(),
)
def test_a_weight_that_is_not_finite_is_skipped_where_the_loss_or_its_gradient_is_not_finite(
    config, kernels, value, data
):
    params, batch = perturbed(fn.init(config)), random_batch(config, 2, 5)
    name = data.draw(st.sampled_from([name for name, w in named_leaves(params).items() if w.numel()]))
    params = with_entry(params, name, data.draw(st.integers(0, 999)), value)
    grads, loss = torch.func.grad_and_value(fn.loss)(params, batch, config)
    finite = all(x.isfinite().all() for x in [loss, *named_leaves(grads).values()])
    training = TrainConfig(batch_size=2, gradient_accumulation_steps=1, compile=False, mixed_precision="fp32")
    state = resume_train_state(params, fn.adamw_init(params), 0)
    after, metrics = make_train_step(config, training, kernels=kernels)(state, batch)
    # Of the loss alone it is not true: PyTorch's attention on the CPU may drop NaN, but its backward does not.
    assert metrics["skipped"] == (not finite)
    if not finite:
        for new, old in zip(named_leaves(after.params).values(), named_leaves(params).values(), strict=True):
            assert torch.equal(new.nan_to_num(), old.nan_to_num())


@pytest.mark.slow
@pytest.mark.usefixtures("no_shape_checks")
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(
    config=configs(mhc_sinkhorn_iters=3),
    remat=st.sampled_from(["none", "mhc", "full"]),
    accumulation=st.integers(1, 2),
    flat=st.booleans(),
)
def test_compiled_program_gradients_equal_those_of_the_loss(config, remat, accumulation, flat):
    remat = "none" if remat == "mhc" and not config.mhc_enabled else remat
    exact = perturbed(fn.init(config, dtype=torch.float64))
    params = tree_map(lambda w: w.float(), exact)
    batch = random_batch(config, 2 * accumulation, 7, ignored=0.3)
    (plain, plain_value), (expected, value) = (
        torch.func.grad_and_value(fn.loss)(p, batch, config) for p in (params, exact)
    )
    scale = 1 / fn.count_targets(batch.targets).clamp(min=1)
    reduce = (lambda vector: vector) if flat else None
    gradients = make_gradients(config, fn.REFERENCE, remat=remat, reduce=reduce, compiled=True)
    microbatches = [fn.Batch(*part) for part in zip(*(x.split(2) for x in batch), strict=True)]
    result = gradients(params, microbatches, scale)
    assert_as_accurate(result.loss, plain_value, value)
    assert_as_accurate(result.grads, plain, expected)
