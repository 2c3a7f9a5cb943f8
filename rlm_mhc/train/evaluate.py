"""The loss on what is held out."""

import torch

from rlm_mhc import fn
from rlm_mhc.data import Prepared, eval_batches
from rlm_mhc.fn.product import without_autocast
from rlm_mhc.parallel import ALONE, Ranks, sum_over_ranks
from rlm_mhc.params import LMParams, cast
from rlm_mhc.program.head import chunk_tokens, chunks
from rlm_mhc.program.precision import COMPUTE_DTYPE
from rlm_mhc.train.run_config import RunConfig


def evaluate(params: LMParams, run: RunConfig, data: Prepared, ranks: Ranks = ALONE) -> float | None:
    """Mean loss in nats over the held-out batches, the same ones every time; None where nothing is held out.

    Each rank takes its share of the batches.
    """
    if data.evaluation.total < 1:
        return None
    training, config = run.training, run.model
    params = cast(params, config, COMPUTE_DTYPE[training.mixed_precision])
    device = params.norm.weight.device
    sums = torch.zeros(2, device=device, dtype=torch.float64)  # fp32 counts tokens up to 2²⁴
    with torch.no_grad(), without_autocast(device.type):
        for number, batch in enumerate(eval_batches(data.evaluation, training.batch_size, training.eval_batches)):
            if number % ranks.world != ranks.rank:
                continue
            hidden = fn.backbone(params, batch.tokens.to(device), config).hidden
            targets = batch.targets.flatten().to(device)
            size = chunk_tokens(len(targets), config.vocab_size, device.type)
            for rows, wanted in zip(chunks(hidden, size), targets.split(size), strict=True):
                sums[0] += fn.token_loss_sum(fn.head(params, rows, config), wanted)
            sums[1] += fn.count_targets(targets)
    total, counted = sum_over_ranks(sums, ranks).tolist()
    return total / max(counted, 1)
