"""One update: microbatches, reduction over ranks, clipping, AdamW."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlm_mhc.config import ModelConfig, TrainConfig
from rlm_mhc.fn.clip import leaf_norms
from rlm_mhc.fn.kernels import REFERENCE, Kernels
from rlm_mhc.fn.loss import Batch, count_targets, require_pairs
from rlm_mhc.fn.optim import adamw
from rlm_mhc.fn.schedule import cosine_schedule
from rlm_mhc.params import LMParams, cast, decay_mask
from rlm_mhc.program.functions import OnCompile
from rlm_mhc.program.gradients import (
    Reduce,
    make_gradients,
    make_loss_sum,
    shared_functions,
    wait,
)
from rlm_mhc.program.monitors import mhc_metrics
from rlm_mhc.program.precision import COMPUTE_DTYPE, next_loss_scale
from rlm_mhc.program.state import TrainState
from rlm_mhc.program.weight_source import WeightSource

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Tensor]]]


class Program(NamedTuple):
    """`step` of `make_train_step`; `loss_sum(params, batch)`, the sum of the token losses of the model's weights in the
    dtype of the step, by the functions that the step has compiled."""

    step: TrainStep
    loss_sum: Callable[[LMParams, Batch], Tensor]


def make_train_step(
    config: ModelConfig,
    train_config: TrainConfig,
    *,
    reduce: Reduce | None = None,
    kernels: Kernels = REFERENCE,
    donate: bool = False,
    on_compile: OnCompile | None = None,
    weight_source: WeightSource | None = None,
) -> TrainStep:
    """`step(state, batch) -> (state, metrics)`, compiled unless `train_config.compile=False`.

    Compiled functions serve one shape of batch; another shape, such as another sequence length, is compiled anew.

    Args:
        config: the model.
        train_config: its training.
        reduce: the sum over ranks of a vector, or a handle whose `wait()` gives it; None: one rank. It is called
            with the number of counted targets, with the flat fp32 gradient of each layer while those before are
            still in backward, with that of the rest, and with the loss. An average does as well, since all of
            them are divided by the first.
        kernels: the operations to run the model with.
        donate: update the state in place, which saves a copy of it; the state passed in must not be used again.
        on_compile: called as `on_compile(number, of, name)` before each function is compiled.
        weight_source: how the model's weights come from `state.params`; None: they are the weights.

    Returns:
        A step. Its batch holds `batch_size × gradient_accumulation_steps` sequences, run as that many microbatches;
        the loss is the mean over all counted targets of all ranks, however they are spread. Its metrics are 0-d
        tensors: `loss`, `grad_norm` (before clipping; `grad_norm/layer_0` and so on of one layer), `lr`, `skipped`
        (1 where loss or gradient was not finite and nothing was updated), and over sampled tokens of this rank and
        all layers `mhc/amax_pre`, `mhc/amax_post` (largest entry of `res` at the attention and MLP sites),
        `mhc/gain_forward`, `mhc/gain_backward` (see `fn.composite_gain`). Without mHC the residual is the identity: all
        four are 1. With it there are also `mhc/row_error`, `mhc/column_error`, `mhc/dominance` and all of them by
        layer, such as `mhc/gain_backward/layer_0`; see `rlm_mhc.program.monitors`.
        With fp16 also `loss_scale`. It runs in `train_config.mixed_precision`, under any `torch.autocast`.

    Raises:
        ValueError: from the step, when the batch is not `[sequences, s]` tokens in int64 or int32 and as many targets
            in int64, with at least one token and the number of sequences that is expected; when the state is of another
            precision; and under a transform of `torch.func`.

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
    return make_program(
        config,
        train_config,
        reduce=reduce,
        kernels=kernels,
        donate=donate,
        on_compile=on_compile,
        weight_source=weight_source,
        evaluates=False,
    ).step


def make_program(
    config: ModelConfig,
    train_config: TrainConfig,
    *,
    reduce: Reduce | None = None,
    kernels: Kernels = REFERENCE,
    donate: bool = False,
    on_compile: OnCompile | None = None,
    weight_source: WeightSource | None = None,
    evaluates: bool = True,
) -> Program:
    """Return the training step and the evaluation of a model, which share what they compile.

    Args:
        config: the model.
        train_config: its training.
        reduce: see `make_train_step`, also for the arguments that follow.
        kernels: see there.
        donate: see there.
        on_compile: see there.
        weight_source: see there.
        evaluates: count `loss_sum` in the number of functions that `on_compile` gets.

    >>> from rlm_mhc import fn
    >>> config = ModelConfig.preset("tiny")
    >>> program = make_program(config, TrainConfig(compile=False))
    >>> tokens = torch.randint(4096, (2, 9))
    >>> program.loss_sum(fn.init(config), fn.Batch(tokens[:, :-1], tokens[:, 1:])).shape
    torch.Size([])
    """
    remat = train_config.remat_policy(config)
    functions = shared_functions(
        config,
        kernels,
        flat=reduce is not None,
        remat=remat,
        compiled=train_config.compile,
        on_compile=on_compile,
        weight_source=weight_source,
        evaluates=evaluates,
    )
    gradients = make_gradients(
        config, kernels, reduce=reduce, remat=remat, weight_source=weight_source, functions=functions
    )
    all_ranks = reduce if reduce is not None else _same
    decay = weight_source.decay if weight_source else decay_mask(config)
    rate, update = _schedule(train_config), _update(train_config)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Tensor]]:
        _require_precision(state, train_config)
        microbatches = _microbatches(batch, train_config)
        compute = state.params
        if weight_source is None:
            compute = cast(compute, config, COMPUTE_DTYPE[train_config.mixed_precision])
        counted = _total(all_ranks, count_targets(batch.targets))
        loss_scale = state.loss_scale.scale if state.loss_scale else torch.ones_like(counted)
        # Sums under one scale rather than averages of averages: ranks and microbatches may count different numbers.
        loss, grads, parts, sampled = gradients(
            compute, microbatches, loss_scale / torch.where(counted > 0, counted, 1.0)
        )
        loss = _total(all_ranks, loss) / loss_scale
        norms = _norms_by_layer(parts) / loss_scale
        norm = torch.linalg.vector_norm(norms)
        skipped = (~(norm + loss).isfinite()).to(torch.float32)
        grad_scale: Tensor | None = loss_scale * (norm / train_config.max_grad_norm).clamp(min=1)
        if norm.is_cpu and grad_scale == 1:
            grad_scale = None  # nothing to divide by; on CUDA to look would be to wait
        lr = rate(state.step)
        options = dict(lr=lr, grad_scale=grad_scale, found_inf=skipped, donate=donate)
        with torch.no_grad():  # weights may require grad, those of a module do; a step is not recorded
            params, moments = update(state.params, grads, state.optimizer, decay, **options)
        metrics = {"loss": loss, "grad_norm": norm, "lr": lr, "skipped": skipped, **mhc_metrics(sampled, loss)}
        metrics |= {f"grad_norm/layer_{number}": value for number, value in enumerate(norms[:-1].unbind())}
        next_scale = state.loss_scale
        if next_scale:
            metrics["loss_scale"] = loss_scale
            next_scale = next_loss_scale(next_scale, skipped)
        return TrainState(params, moments, state.step + 1, next_scale), metrics

    return Program(step, make_loss_sum(config, functions))


def _schedule(train_config: TrainConfig) -> Callable[[Tensor], Tensor]:
    schedule = train_config.scheduler
    return partial(
        cosine_schedule,
        lr=train_config.optimizer.lr,
        warmup_steps=schedule.warmup_steps,
        max_steps=train_config.max_steps,
        min_lr_ratio=schedule.min_lr_ratio,
    )


def _update(train_config: TrainConfig) -> Callable[..., Any]:
    optimizer = train_config.optimizer
    return partial(adamw, betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay)


def _require_precision(state: TrainState, train_config: TrainConfig) -> None:
    if bool(state.loss_scale) != (train_config.mixed_precision == "fp16"):
        found = "a" if state.loss_scale else "no"
        raise ValueError(
            f"mixed_precision={train_config.mixed_precision!r}, but the state has {found} loss scale; "
            "make it with init_train_state and the same train_config"
        )


def _norms_by_layer(parts: list[list[Tensor]]) -> Tensor:
    """`[layers + 1]`: the norm of each layer's gradient, all of as many tensors, and of the rest."""
    *layers, rest = parts
    norms = leaf_norms(parts)
    of_layers, of_rest = norms.split([len(norms) - len(rest), len(rest)])
    by_layer = torch.linalg.vector_norm(of_layers.reshape(len(layers), -1), dim=-1)
    return torch.cat([by_layer, torch.linalg.vector_norm(of_rest, dim=-1, keepdim=True)])


def _same(vector: Tensor) -> Tensor:
    return vector


def _total(reduce: Callable[[Tensor], Any], value: Tensor) -> Tensor:
    """A 0-d tensor summed over the ranks, in fp32."""
    return wait(reduce(value.to(torch.float32).reshape(1)))[0]


def _microbatches(batch: Batch, train_config: TrainConfig) -> list[Batch]:
    require_pairs(batch)
    expected = train_config.sequences_per_step
    if batch.tokens.dim() != 2:
        raise ValueError(f"tokens {list(batch.tokens.shape)}: expected [sequences, s]")
    if len(batch.tokens) != expected:
        raise ValueError(
            f"batch of {len(batch.tokens)} sequences: a step takes batch_size × gradient_accumulation_steps "
            f"= {train_config.batch_size} × {train_config.gradient_accumulation_steps} = {expected}"
        )
    return [Batch(*part) for part in zip(*(x.split(train_config.batch_size) for x in batch), strict=True)]
