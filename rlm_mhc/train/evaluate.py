"""The loss on what is held out."""

from collections.abc import Callable

import torch
from torch import Tensor

from rlm_mhc.data import Prepared, eval_batches
from rlm_mhc.fn import Batch, count_targets
from rlm_mhc.parallel import ALONE, Ranks, sum_over_ranks
from rlm_mhc.params import LMParams, cast
from rlm_mhc.program.precision import COMPUTE_DTYPE
from rlm_mhc.train.run_config import RunConfig
from rlm_mhc.types import IGNORED_TARGET


def evaluate(
    loss_sum: Callable[[LMParams, Batch], Tensor],
    params: LMParams,
    run: RunConfig,
    data: Prepared,
    ranks: Ranks = ALONE,
) -> float | None:
    """Mean loss in nats over the held-out batches, the same ones every time; None where nothing is held out.

    Each rank takes its share of the batches.

    Args:
        loss_sum: of `make_program`.
        params: the model's weights, in any dtype.
        run: the whole config.
        data: with what is held out.
        ranks: all that evaluate.
    """
    if data.evaluation.total < 1:
        return None
    training, config = run.training, run.model
    params = cast(params, config, COMPUTE_DTYPE[training.mixed_precision])
    device = params.norm.weight.device
    sums = torch.zeros(2, device=device, dtype=torch.float64)  # fp32 counts tokens up to 2²⁴
    for number, batch in enumerate(eval_batches(data.evaluation, training.batch_size, training.eval_batches)):
        if number % ranks.world == ranks.rank:
            batch = Batch(*(x.to(device) for x in filled(batch, training.batch_size)))
            sums[0] += loss_sum(params, batch)
            sums[1] += count_targets(batch.targets)
    total, counted = sum_over_ranks(sums, ranks).tolist()
    return total / max(counted, 1)


def filled(batch: Batch, size: int) -> Batch:
    """Return a batch of `size` rows, the last ones without targets: what is compiled serves one shape.

    >>> filled(Batch(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])), 2)
    Batch(tokens=tensor([[1, 2],
            [0, 0]]), targets=tensor([[   2,    3],
            [-100, -100]]))
    """
    missing = size - len(batch.tokens)
    if missing <= 0:
        return batch
    tokens, targets = (
        torch.cat([x, x.new_full((missing, x.shape[1]), fill)])
        for x, fill in ((batch.tokens, 0), (batch.targets, IGNORED_TARGET))
    )
    return Batch(tokens, targets)
