"""Keys and values of the tokens that a model has read: a pytree of fixed size, whatever it holds."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.tree import tree_map


class LayerCache(NamedTuple):
    """Keys and values of one layer, each `[*b, kv, places, d]`."""

    keys: Tensor
    values: Tensor


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

    def select(self, rows: Int[Tensor, " r"]) -> "Cache":
        """Return a copy of the rows of these indices, in their order; a row may come several times.

        >>> cache = init_cache(ModelConfig.preset("tiny"), 2, 16)
        >>> cache.select(torch.tensor([1, 0, 1])).lengths
        tensor([0, 0, 0])
        """
        return Cache(*(tree_map(lambda x: x.index_select(0, rows.to(x.device)), part) for part in self))


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


def write(
    cached: Float[Tensor, "*b kv places d"],
    new: Float[Tensor, "*b kv s d"],
    places: Int[Tensor, "*b s"],
    donate: bool = False,
) -> Float[Tensor, "*b kv places d"]:
    """Return `cached` with `new` in each row's own places; with `donate` it is written in place.

    >>> write(torch.zeros(1, 3, 1), torch.ones(1, 1, 1), torch.tensor([2])).flatten()
    tensor([0., 0., 1.])
    """
    new = new.to(cached.dtype)
    if not donate:
        return cached.scatter(-2, places[..., None, :, None].expand_as(new), new)
    # Not scatter_: the compiler would copy the whole cache for it, at every step.
    rows = cached.view(-1, *cached.shape[-3:])
    row = torch.arange(len(rows), dtype=torch.int64, device=rows.device).unsqueeze(-1)
    rows[row, :, places.reshape(len(rows), -1)] = new.reshape(-1, *new.shape[-3:]).transpose(1, 2)
    return cached
