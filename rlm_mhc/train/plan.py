"""What a run is about to do and what it needs, said before it starts."""

import math
from typing import NamedTuple

import torch

from rlm_mhc.config import LoraConfig, ModelConfig, TrainConfig
from rlm_mhc.fn import REFERENCE, Kernels, count, init, lora_init
from rlm_mhc.program.memory import count_activations
from rlm_mhc.program.precision import COMPUTE_DTYPE
from rlm_mhc.train.device import MEMORY_ADVICE, available_bytes, describe, peak_rate
from rlm_mhc.tree import size, size_bytes

GIB = 1 << 30
RESERVED_BYTES = GIB // 2
# Above this share of what is there, what is counted is refused; between it and all, it is only warned of.
CERTAIN = 0.9
# More passes over the same data hardly lower the loss (Muennighoff et al., arXiv 2305.16264).
USEFUL_EPOCHS = 16
TYPICAL_UTILISATION = {"cpu": 0.3, "cuda": 0.4}


class Plan(NamedTuple):
    """Sizes in bytes, work per update in floating-point operations, rates in operations per second, and the kernels
    that they are for."""

    params: int
    tokens_per_step: int
    flops_per_step: float
    parts: dict[str, int]
    available: int | None
    peak_rate: float
    lines: tuple[str, ...]
    kernels: Kernels = REFERENCE

    def require_memory(self) -> None:
        """Stop where memory cannot suffice.

        Raises:
            ValueError: saying what is needed, what there is, and what to do.
        """
        needed = sum(self.parts.values())
        if self.available is not None and needed * CERTAIN > self.available:
            raise ValueError(
                f"this run needs about {needed / GIB:.1f} GiB of memory and the device has "
                f"{self.available / GIB:.1f} GiB; {MEMORY_ADVICE}"
            )


def make_plan(
    config: ModelConfig,
    training: TrainConfig,
    length: int,
    device: torch.device,
    world: int = 1,
    lora: LoraConfig | None = None,
    kernels: Kernels = REFERENCE,
) -> Plan:
    """Count parameters, tokens, operations and memory of a run with sequences of `length` tokens, of all weights or of
    adapters.

    Activations are the most that is alive at once beside gradients of full size; see `count_activations`. A checkpoint
    is written from a copy of the state while the training goes on.
    """
    compute = COMPUTE_DTYPE[training.mixed_precision]
    total = count(config)
    available = available_bytes(device)
    parts = _memory(config, training, length, device.type, available, lora, kernels)
    tokens = training.sequences_per_step * length * world
    flops = flops_per_token(config, length) * tokens
    peak, basis = peak_rate(device, compute)
    peak *= world
    seconds = training.max_steps * flops / (peak * TYPICAL_UTILISATION[device.type])
    kind = f"mHC with {config.mhc_flows} streams" if config.mhc_enabled else "plain residual"
    needed = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
    lines: tuple[str, ...] = (
        f"model        {total:,} parameters: {config.num_layers} layers, width {config.hidden_dim}, {kind}",
        *([f"trained      {_adapters(config, lora)}"] if lora else []),
        f"device       {f'{world} × ' if world > 1 else ''}{describe(device)}; peak {basis}",
        f"precision    {training.mixed_precision}{', compiled' if training.compile else ', not compiled'}",
        f"batch        {tokens:,} tokens per step = {training.batch_size} sequences × "
        f"{training.gradient_accumulation_steps} accumulated × {length} tokens"
        + (f" × {world} ranks" if world > 1 else ""),
        f"work         {training.max_steps:,} steps, {training.max_steps * tokens:,} tokens, "
        f"{flops * training.max_steps:.2e} floating-point operations",
        f"memory       {_gib(sum(parts.values()))} needed: {needed}",
        f"             {_gib(available) if available is not None else 'unknown'} on the device",
        *_host_lines(config, lora, device),
        f"time         about {_duration(seconds)} if {TYPICAL_UTILISATION[device.type]:.0%} of the peak is reached, "
        "and the progress bar will know better",
    )
    if available is not None and sum(parts.values()) > available:
        lines += (f"warning      this may not fit; {MEMORY_ADVICE}",)
    if training.scheduler.warmup_steps >= training.max_steps:
        lines += (
            f"warning      training.scheduler.warmup_steps={training.scheduler.warmup_steps} is not below "
            f"training.max_steps={training.max_steps}: the learning rate rises to the end and never falls",
        )
    if config.ffn_width % 16:
        lines += (f"warning      model.ffn_dim={config.ffn_width} is no multiple of 16, which wastes tensor cores",)
    return Plan(total, tokens, flops, parts, available, peak, lines, kernels)


def epoch_lines(training: TrainConfig, sequences: int, world: int = 1) -> tuple[str, ...]:
    """Return lines about how often a run sees each of its training sequences.

    >>> epoch_lines(TrainConfig(batch_size=2, gradient_accumulation_steps=2, max_steps=30), 48)
    ('epochs       2.5: 120 sequences are drawn from 48',)
    """
    drawn = training.max_steps * training.sequences_per_step * world
    lines = [f"epochs       {drawn / max(sequences, 1):,.1f}: {drawn:,} sequences are drawn from {sequences:,}"]
    if drawn > USEFUL_EPOCHS * sequences:
        lines.append(
            f"warning      more than {USEFUL_EPOCHS} epochs hardly lower the loss; lower training.max_steps or add data"
        )
    return tuple(lines)


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Operations of forward and backward per token: 6 per parameter that multiplies, 6·s·h·d per causal attention."""
    used_once = config.vocab_size * config.hidden_dim
    multiplied = count(config) - (0 if config.tie_embeddings else used_once)
    attention = 6 * config.num_layers * length * config.num_heads * config.head_width
    return 6 * multiplied + attention


def _memory(
    config: ModelConfig,
    training: TrainConfig,
    length: int,
    device: str,
    available: int | None,
    lora: LoraConfig | None,
    kernels: Kernels,
) -> dict[str, int]:
    compute = COMPUTE_DTYPE[training.mixed_precision]
    masters = 4 * (_adapted(config, lora) if lora else count(config))
    parts = {"weights": masters, "optimizer": 2 * masters, "gradients": masters}
    if device == "cpu":  # a CUDA device keeps the copy only where there is room for it
        parts["checkpoint"] = 3 * masters
    if lora or compute != torch.float32:
        parts["weights"] += size_bytes(init(config, device="meta", dtype=compute))
    least = config.num_layers * training.batch_size * length * config.hidden_dim * compute.itemsize
    if available is not None and sum(parts.values()) + least > available / CERTAIN:
        # Shapes that are out of the question need no tracing, and may be too large for it.
        return parts | {"activations": least, "runtime": RESERVED_BYTES}
    remat = training.remat_policy(config)
    activations = count_activations(
        config,
        training.batch_size,
        length,
        compute,
        remat,
        device,
        kernels,
        embedding_trained=lora is None,
        compiled=training.compile,
    )
    if lora:
        # A step holds one merged layer and its fp32 gradients, an evaluation all merged layers. A checkpoint is written
        # from a merged copy that is live during both.
        layer = init(config.replace(num_layers=1), device="meta", dtype=compute).layers[0]
        at_once = max(activations.head, activations.layer + size_bytes(layer) + 4 * size(layer))
        merged = config.num_layers * size_bytes(layer)
        parts["checkpoint"] = parts.get("checkpoint", 0) + merged
        return parts | {"activations": max(activations.kept + at_once, merged), "runtime": RESERVED_BYTES}
    top = 4 * (config.vocab_size * (1 if config.tie_embeddings else 2) + 1) * config.hidden_dim
    accumulated = training.gradient_accumulation_steps > 1
    peak = activations.peak(masters, top, config.num_layers, accumulated)
    return parts | {"activations": peak - masters, "runtime": RESERVED_BYTES}


def _host_lines(config: ModelConfig, lora: LoraConfig | None, device: torch.device) -> list[str]:
    """Return the plan's line on host memory: a checkpoint of a CUDA device copies the state there."""
    if device.type != "cuda":
        return []
    copied, free = 12 * (_adapted(config, lora) if lora else count(config)), available_bytes(torch.device("cpu"))
    known = f" of {_gib(free)}" if free is not None else ""
    return [f"             a checkpoint takes up to {_gib(copied)}{known} of the host's memory beside it"]


def _adapted(config: ModelConfig, lora: LoraConfig) -> int:
    """How many numbers are trained."""
    one = lora_init(init(config.replace(num_layers=1), device="meta"), lora)
    return config.num_layers * size(one.layers) + size(one.head_mhc)


def _adapters(config: ModelConfig, lora: LoraConfig) -> str:
    beside = " and the weights of mHC" if lora.train_mhc and config.mhc_enabled else ""
    return f"{_adapted(config, lora):,} parameters: adapters of rank {lora.rank} to {', '.join(lora.targets)}{beside}"


def _gib(amount: float) -> str:
    return f"{amount / GIB:.2f} GiB" if amount >= GIB / 10 else f"{amount / (1 << 20):.0f} MiB"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "an unknown time"
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
