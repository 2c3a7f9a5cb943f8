"""What a run is about to do and what it needs, said before it starts."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rlm_mhc.config import ModelConfig, TrainConfig
from rlm_mhc.fn import Batch, count, embed, head, init, positions, token_loss_sum
from rlm_mhc.fn.block import block
from rlm_mhc.params import LMParams
from rlm_mhc.program.precision import COMPUTE_DTYPE
from rlm_mhc.train.device import MEMORY_ADVICE, available_bytes, describe, peak_rate
from rlm_mhc.tree import size_bytes, tree_leaves, tree_map

GIB = 1 << 30
RESERVED_BYTES = GIB // 2
TYPICAL_UTILISATION = {"cpu": 0.3, "cuda": 0.4}


class Plan(NamedTuple):
    """Sizes in bytes, work per update in floating-point operations, rates in operations per second."""

    params: int
    tokens_per_step: int
    flops_per_step: float
    parts: dict[str, int]
    available: int | None
    peak_rate: float
    lines: tuple[str, ...]

    def require_memory(self) -> None:
        """Stop where memory cannot suffice.

        Raises:
            ValueError: saying what is needed, what there is, and what to do.
        """
        needed = sum(self.parts.values())
        if self.available is not None and needed > self.available:
            raise ValueError(
                f"this run needs about {needed / GIB:.1f} GiB of memory and the device has "
                f"{self.available / GIB:.1f} GiB; {MEMORY_ADVICE}"
            )


def make_plan(config: ModelConfig, training: TrainConfig, length: int, device: torch.device, world: int = 1) -> Plan:
    """Count parameters, tokens, operations and memory of a run with sequences of `length` tokens.

    Activations are those that plain autograd keeps, traced without memory on one block and the head of the real
    shapes; a compiled step keeps fewer.
    """
    compute = COMPUTE_DTYPE[training.mixed_precision]
    total = count(config)
    available = available_bytes(device)
    parts = _memory(config, training, length, compute, available)
    tokens = training.sequences_per_step * length * world
    flops = flops_per_token(config, length) * tokens
    peak, basis = peak_rate(device, compute)
    peak *= world
    seconds = training.max_steps * flops / (peak * TYPICAL_UTILISATION[device.type])
    kind = f"mHC with {config.mhc_flows} streams" if config.mhc_enabled else "plain residual"
    needed = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
    lines: tuple[str, ...] = (
        f"model        {total:,} parameters: {config.num_layers} layers, width {config.hidden_dim}, {kind}",
        f"device       {f'{world} × ' if world > 1 else ''}{describe(device)}; peak {basis}",
        f"precision    {training.mixed_precision}{', compiled' if training.compile else ', not compiled'}",
        f"batch        {tokens:,} tokens per step = {training.batch_size} sequences × "
        f"{training.gradient_accumulation_steps} accumulated × {length} tokens"
        + (f" × {world} ranks" if world > 1 else ""),
        f"work         {training.max_steps:,} steps, {training.max_steps * tokens:,} tokens, "
        f"{flops * training.max_steps:.2e} floating-point operations",
        f"memory       {_gib(sum(parts.values()))} needed: {needed}",
        f"             {_gib(available) if available is not None else 'unknown'} on the device",
        f"time         about {_duration(seconds)} if {TYPICAL_UTILISATION[device.type]:.0%} of the peak is reached, "
        "and the progress bar will know better",
    )
    if config.ffn_width % 16:
        lines += (f"warning      model.ffn_dim={config.ffn_width} is no multiple of 16, which wastes tensor cores",)
    return Plan(total, tokens, flops, parts, available, peak, lines)


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Operations of forward and backward per token: 6 per parameter that multiplies, 6·s·h·d per causal attention."""
    used_once = config.vocab_size * config.hidden_dim
    multiplied = count(config) - (0 if config.tie_embeddings else used_once)
    attention = 6 * config.num_layers * length * config.num_heads * config.head_width
    return 6 * multiplied + attention


def _memory(
    config: ModelConfig, training: TrainConfig, length: int, compute: torch.dtype, available: int | None
) -> dict[str, int]:
    masters = 4 * count(config)
    # The sum over microbatches, and beside it one microbatch's own or the clipped copy.
    parts = {"weights": masters, "gradients": 2 * masters, "optimizer": 2 * masters}
    if compute != torch.float32:
        parts["weights"] += size_bytes(init(config, device="meta", dtype=compute))
    least = config.num_layers * training.batch_size * length * config.hidden_dim * compute.itemsize
    # Shapes that are out of the question need no tracing, and may be too large for it.
    hopeless = available is not None and sum(parts.values()) + least > available
    parts["activations"] = least if hopeless else _activations(config, training.batch_size, length, compute)
    return parts | {"runtime": RESERVED_BYTES}


def _activations(config: ModelConfig, batch_size: int, length: int, compute: torch.dtype) -> int:
    """Bytes that autograd keeps for one microbatch, counted on tensors without storage."""
    with FakeTensorMode():
        params = tree_map(lambda w: torch.empty_like(w, device="cpu").requires_grad_(), _shapes(config, compute))
        tokens = torch.zeros(batch_size, length, dtype=torch.int64)
        hidden = embed(params, tokens, config)
        cos, sin = positions(tokens, config)
        weights = {w.untyped_storage()._cdata for w in tree_leaves(params)}

        def layer() -> Tensor:
            return block(params.layers[0], hidden, cos, sin, config).hidden

        def top() -> Tensor:
            return token_loss_sum(head(params, hidden, config), Batch(tokens, tokens).targets)

        return config.num_layers * _kept(layer, weights) + 2 * _kept(top, weights)


def _shapes(config: ModelConfig, compute: torch.dtype) -> LMParams:
    return init(config.replace(num_layers=1), device="meta", dtype=compute)


def _kept(run: Callable[[], Tensor], weights: set[int]) -> int:
    storages: dict[object, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = run()
    del result
    return sum(storages.values())


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / (1 << 20):.0f} MiB"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "an unknown time"
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
