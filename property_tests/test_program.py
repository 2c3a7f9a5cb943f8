"""The program of stages computes the gradient of `fn.loss`, however the work is cut."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_mhc import fn
from rlm_mhc.program.gradients import make_gradients
from rlm_mhc.testing import TOLERANCE, assert_trees_close, random_batch, ranks_in_threads
from rlm_mhc.testing.strategies import configs
from rlm_mhc.tree import named_leaves, tree_map


def disturbed(config, dtype):
    """Weights away from the symmetric start, where gradients that should not be zero are not."""
    params = fn.init(config, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    return tree_map(lambda w: w + 0.1 * torch.randn(w.shape, generator=generator, dtype=w.dtype), params)


def floor(grads):
    """Leaves that are zero by symmetry, or small by cancellation, hold the rounding of larger ones."""
    return 1e-2 * max(g.abs().max().item() for g in named_leaves(grads).values())


@settings(max_examples=30, deadline=None)
@given(
    config=configs(),
    remat=st.sampled_from(["none", "mhc", "full"]),
    ranks=st.sampled_from([1, 2]),
    accumulation=st.integers(1, 3),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_program_gradients_equal_those_of_the_loss(config, remat, ranks, accumulation, dtype):
    remat = "none" if remat == "mhc" and not config.mhc_enabled else remat
    exact = disturbed(config, torch.float64)
    params = tree_map(lambda w: w.to(dtype), exact)
    batch = random_batch(config, 2 * ranks * accumulation, 7, ignored=0.3)
    expected, value = torch.func.grad_and_value(fn.loss)(exact, batch, config)
    scale = 1 / fn.count_targets(batch.targets).clamp(min=1).to(dtype)

    def run(rank, reduce):
        own = [
            fn.Batch(*pair) for pair in zip(*(x.view(accumulation, ranks, 2, -1)[:, rank] for x in batch), strict=True)
        ]
        gradients = make_gradients(config, fn.REFERENCE, remat=remat, reduce=reduce if ranks > 1 else None)
        return gradients(params, own, scale)

    results = ranks_in_threads(ranks, run)
    loss = sum(result.loss for result in results)
    torch.testing.assert_close(loss.double(), value, rtol=TOLERANCE[dtype], atol=0)
    for result in results:
        assert_trees_close(result.grads, expected, TOLERANCE[dtype], floor(expected))
