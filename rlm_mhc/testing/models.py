"""Small models and batches to test with."""

from typing import Any

import torch

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn import Batch


def small_config(**changes: Any) -> ModelConfig:
    """A model of a few thousand parameters with grouped heads."""
    fields = dict(hidden_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48, vocab_size=61, max_seq_len=64)
    return ModelConfig(**(fields | changes))


def random_batch(config: ModelConfig, *shape: int, seed: int = 0, ignored: float = 0.0) -> Batch:
    """Random tokens and targets of a shape `[*b, s]`, a share of the targets ignored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (*shape, 2), generator=generator)
    mask = torch.rand(shape, generator=generator) < ignored
    return Batch(tokens[..., 0].contiguous(), tokens[..., 1].masked_fill(mask, -100))
