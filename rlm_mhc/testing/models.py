"""Small models and batches to test with, and several ranks in one process."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlm_mhc.config import ModelConfig, TrainConfig
from rlm_mhc.fn import Batch
from rlm_mhc.tree import map_named, tree_map

T = TypeVar("T")


def small_config(**changes: Any) -> ModelConfig:
    """A model of a few thousand parameters with grouped heads."""
    fields = dict(hidden_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48, vocab_size=61, max_seq_len=64)
    return ModelConfig(**(fields | changes))


def small_training(batch_size: int = 2, accumulation: int = 2, **changes: Any) -> TrainConfig:
    """An uncompiled step of so many sequences in so many microbatches, in fp32 and without clipping."""
    fields: dict[str, Any] = dict(
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        mixed_precision="fp32",
        compile=False,
        max_steps=50,
        max_grad_norm=1e9,
        optimizer={"lr": 1e-2},
        scheduler={"warmup_steps": 2},
    )
    return TrainConfig(**(fields | changes))


def perturbed(params: Any, size: float = 0.1, seed: int = 1) -> Any:
    """A tree with noise of that size on every weight: away from the symmetric start, gradients that should not be
    zero are not."""
    generator = torch.Generator().manual_seed(seed)
    return tree_map(
        lambda w: w + size * torch.randn(w.shape, generator=generator, dtype=w.dtype, device="cpu").to(w.device), params
    )


def with_wide_vectors(params: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A tree whose norms and biases have a dtype of their own, as checkpoints that were trained in mixed precision."""
    return map_named(lambda name, leaf: leaf.to(dtype) if leaf.dim() == 1 and "mhc" not in name else leaf, params)


def double(tree: Any) -> Any:
    """A tree in float64; integers and truth values stay."""
    return tree_map(lambda x: x.double() if x.is_floating_point() else x, tree)


def with_entry(params: Any, name: str, index: int, value: float) -> Any:
    """A tree whose leaf of a name has `value` at `index`, counted through the flat leaf and round again."""

    def changed(own: str, leaf: Tensor) -> Tensor:
        if own != name:
            return leaf
        flat = leaf.flatten().clone()
        flat[index % len(flat)] = value
        return flat.view(leaf.shape)

    return map_named(changed, params)


def random_batch(config: ModelConfig, *shape: int, seed: int = 0, ignored: float = 0.0) -> Batch:
    """Random tokens and targets of a shape `[*b, s]`, a share of the targets ignored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (*shape, 2), generator=generator, dtype=torch.int64, device="cpu")
    mask = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") < ignored
    return Batch(tokens[..., 0].contiguous(), tokens[..., 1].masked_fill(mask, -100))


def ranks_in_threads(ranks: int, run: Callable[[int, Callable[[Tensor], Tensor]], T]) -> list[T]:
    """`[run(rank, reduce) for each rank]`, the ranks being threads of this process and `reduce` the sum over them."""
    barrier = threading.Barrier(ranks, timeout=60)
    vectors: dict[int, Tensor] = {}

    def reduce(rank: int, vector: Tensor) -> Tensor:
        vectors[rank] = vector
        barrier.wait()
        total = torch.stack([vectors[other] for other in range(ranks)]).sum(0)
        barrier.wait()
        return total

    def guarded(rank: int) -> T:
        try:
            return run(rank, partial(reduce, rank))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(guarded, range(ranks)))
