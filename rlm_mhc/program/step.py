"""One update: microbatches, reduction over ranks, clipping, AdamW."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rlm_mhc.config import ModelConfig, TrainConfig
from rlm_mhc.fn.gain import composite_gain
from rlm_mhc.fn.kernels import REFERENCE, Kernels
from rlm_mhc.fn.loss import Batch, count_targets
from rlm_mhc.fn.norm import widen
from rlm_mhc.fn.optim import adamw, clip_by_global_norm
from rlm_mhc.fn.schedule import cosine_schedule
from rlm_mhc.params import LMParams, cast, decay_mask
from rlm_mhc.program.gradients import Gradients, make_gradients
from rlm_mhc.program.state import TrainState
from rlm_mhc.tree import ravel, tree_map, unravel

COMPUTE_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Tensor]]]


def make_train_step(
    config: ModelConfig,
    train_config: TrainConfig,
    *,
    reduce: Callable[[Tensor], Tensor] | None = None,
    kernels: Kernels = REFERENCE,
    donate: bool = False,
) -> TrainStep:
    """`step(state, batch) -> (state, metrics)`, compiled unless `train_config.compile=False`.

    Args:
        config: the model.
        train_config: its training.
        reduce: called with the flat fp32 gradient of each layer and of the rest; returns its average over ranks,
            or a handle whose `wait()` gives it. None: one rank.
        kernels: the operations to run the model with.
        donate: update the state in place, which saves a copy of it; the state passed in must not be used again.

    Returns:
        A step. Its batch holds `batch_size × gradient_accumulation_steps` sequences, run as that many microbatches;
        the loss is the mean over all counted targets, however they are spread. Its metrics are 0-d tensors:
        `loss`, `grad_norm` (before clipping), `lr`, and over sampled tokens of all layers `mhc/amax_pre`,
        `mhc/amax_post` (largest entry of `res` at the attention and MLP sites), `mhc/gain_forward`,
        `mhc/gain_backward` (see `fn.composite_gain`). Without mHC the residual is the identity: all four are 1.

    Raises:
        ValueError: from the step, when the batch has another number of sequences.

    >>> from rlm_mhc import fn
    >>> from rlm_mhc.program import init_train_state, make_train_step
    >>> config = ModelConfig.preset("tiny")
    >>> training = TrainConfig(batch_size=1, gradient_accumulation_steps=2, compile=False)
    >>> tokens = torch.randint(4096, (2, 9))
    >>> state, metrics = make_train_step(config, training)(
    ...     init_train_state(config, training, device="cpu"), fn.Batch(tokens[:, :-1], tokens[:, 1:])
    ... )
    >>> state.step
    tensor(1)
    """
    gradients = make_gradients(config, kernels, train_config.compile)
    optimizer, schedule = train_config.optimizer, train_config.scheduler
    decay = decay_mask(config)
    rate = partial(
        cosine_schedule,
        lr=optimizer.lr,
        warmup_steps=schedule.warmup_steps,
        max_steps=train_config.max_steps,
        min_lr_ratio=schedule.min_lr_ratio,
    )

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Tensor]]:
        compute = cast(state.params, config, COMPUTE_DTYPE[train_config.mixed_precision])
        loss, grads, res = _accumulate(gradients, compute, batch, train_config)
        if reduce is not None:
            grads = _reduce(grads, reduce)
        grads, norm = clip_by_global_norm(grads, train_config.max_grad_norm)
        lr = rate(state.step)
        params, moments = adamw(
            state.params,
            grads,
            state.optimizer,
            decay,
            lr=lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            donate=donate,
        )
        metrics = {"loss": loss, "grad_norm": norm, "lr": lr, **_monitors(res, loss)}
        return TrainState(params, moments, state.step + 1), metrics

    return step


def _accumulate(
    gradients: Callable[[LMParams, Batch, Tensor], Gradients],
    params: LMParams,
    batch: Batch,
    train_config: TrainConfig,
) -> Gradients:
    expected = train_config.sequences_per_step
    if len(batch.tokens) != expected:
        raise ValueError(
            f"batch of {len(batch.tokens)} sequences: a step takes batch_size × gradient_accumulation_steps "
            f"= {train_config.batch_size} × {train_config.gradient_accumulation_steps} = {expected}"
        )
    scale = 1.0 / count_targets(batch.targets).clamp(min=1).to(torch.float32)
    parts = zip(*(x.split(train_config.batch_size) for x in batch), strict=True)
    first, *rest = [Batch(*part) for part in parts]
    total = gradients(params, first, scale)
    # Sums of one scale rather than averages of averages: microbatches may count different numbers of targets.
    total = total._replace(grads=tree_map(widen, total.grads))
    for microbatch in rest:
        part = gradients(params, microbatch, scale)
        tree_map(lambda sum_, g: sum_.add_(g), total.grads, part.grads)
        res = tuple(torch.cat(pair) for pair in zip(total.res, part.res, strict=True))
        total = Gradients(total.loss + part.loss, total.grads, res)
    return total


def _reduce(grads: LMParams, reduce: Callable[[Tensor], Tensor]) -> LMParams:
    pending = [reduce(ravel(group)) for group in (grads._replace(layers=()), *grads.layers)]
    done = [handle.wait() if hasattr(handle, "wait") else handle for handle in pending]
    layers = tuple(unravel(vector, layer) for vector, layer in zip(done[1:], grads.layers, strict=True))
    return unravel(done[0], grads._replace(layers=()))._replace(layers=layers)


def _monitors(res: tuple[Tensor, ...], like: Tensor) -> dict[str, Tensor]:
    if not res:
        one = torch.ones_like(like)
        return dict.fromkeys(("mhc/amax_pre", "mhc/amax_post", "mhc/gain_forward", "mhc/gain_backward"), one)
    stacked = torch.stack(res)
    forward, backward = composite_gain(stacked)
    return {
        "mhc/amax_pre": stacked[0::2].amax(),
        "mhc/amax_post": stacked[1::2].amax(),
        "mhc/gain_forward": forward.amax(),
        "mhc/gain_backward": backward.amax(),
    }
