"""Keys and values of the tokens that a model has read: a pytree of fixed size, whatever it holds."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlm_mhc.config import ModelConfig


class Cache(NamedTuple):
    """What attention has seen. Rows may hold different numbers of tokens; what lies beyond a row's is never read.

    `keys`, `values`: of each layer `[*b, kv, places, d]`, keys rotated; `lengths [*b]`: how many
    tokens each row holds.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    lengths: Tensor

    @property
    def size(self) -> int:
        """How many tokens a row has room for."""
        return self.keys[0].shape[-2]


def init_cache(
    config: ModelConfig,
    batch: int | tuple[int, ...],
    size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Cache:
    """An empty cache of `2 · num_layers · kv_heads · head_dim · size` numbers a row.

    Args:
        config: the model's shape.
        batch: how many rows, or the axes `*b`.
        size: tokens a row has room for, at most `max_seq_len`.
        dtype: of keys and values; as a rule that of the model's matrices.
        device: where it lies.

    Raises:
        ValueError: on a size below 1 or beyond `max_seq_len`, where the model knows no positions.

    >>> cache = init_cache(ModelConfig.preset("tiny"), 2, 16)
    >>> len(cache.keys), cache.keys[0].shape, cache.lengths
    (6, torch.Size([2, 4, 16, 32]), tensor([0, 0]))
    """
    if not 1 <= size <= config.max_seq_len:
        raise ValueError(f"size={size} of the cache: expected 1 to max_seq_len={config.max_seq_len} of the model")
    axes = (batch,) if isinstance(batch, int) else tuple(batch)
    shape = (*axes, config.kv_heads, size, config.head_width)
    # Zeros: what is never read is still multiplied by zero, which uninitialised memory may not survive.
    keys, values = (
        tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)) for _ in range(2)
    )
    return Cache(keys, values, torch.zeros(axes, dtype=torch.int64, device=device))


def write_first(
    cached: Float[Tensor, "*b kv places d"], new: Float[Tensor, "*b kv s d"], donate: bool = False
) -> Float[Tensor, "*b kv places d"]:
    """`cached` with `new` in the first s places; with `donate` it is written itself.

    >>> write_first(torch.zeros(1, 3, 1), torch.ones(1, 2, 1)).flatten()
    tensor([1., 1., 0.])
    """
    new = new.to(cached.dtype)
    if not donate:
        return torch.cat([new, cached[..., new.shape[-2] :, :]], dim=-2)
    cached[..., : new.shape[-2], :] = new
    return cached


def write_at(
    cached: Float[Tensor, "*b kv places d"],
    new: Float[Tensor, "*b kv 1 d"],
    places: Int[Tensor, "*b"],
    donate: bool = False,
) -> Float[Tensor, "*b kv places d"]:
    """`cached` with one token in each row's own place; with `donate` it is written itself.

    >>> write_at(torch.zeros(1, 3, 1), torch.ones(1, 1, 1), torch.tensor(2)).flatten()
    tensor([0., 0., 1.])
    """
    new = new.to(cached.dtype)
    if not donate:
        return cached.scatter(-2, places[..., None, None, None].expand_as(new), new)
    # Not scatter_: the compiler would copy the whole cache for it, at every step.
    rows = cached.view(-1, *cached.shape[-3:])
    rows[torch.arange(len(rows), dtype=torch.int64, device=rows.device), :, places.reshape(-1)] = new.reshape(
        -1, *new.shape[-3::2]
    )
    return cached
