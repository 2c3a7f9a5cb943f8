"""Reading a prompt into a cache, and going on from there token by token."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.block import block
from rlm_mhc.fn.cache import Cache, write_at, write_first
from rlm_mhc.fn.kernels import REFERENCE, Kernels
from rlm_mhc.fn.layout import overlap, require_entries
from rlm_mhc.fn.lm import embed, head
from rlm_mhc.fn.mhc import Hidden
from rlm_mhc.fn.rope import rotary_table
from rlm_mhc.fn.transforms import is_transformed
from rlm_mhc.params import LMParams
from rlm_mhc.tree import tree_map
from rlm_mhc.types import NextLogits, PerRow, Tokens

# A layer's attention over a cache: `attend(keys, values, q, k, v)` gives its output, and keys and values with k and v.
Attend = Callable[..., tuple[Tensor, Tensor, Tensor]]


def prefill(
    params: LMParams,
    tokens: Tokens,
    config: ModelConfig,
    cache: Cache,
    kernels: Kernels = REFERENCE,
    *,
    lengths: PerRow | None = None,
    donate: bool = False,
) -> tuple[NextLogits, Cache]:
    """Read prompts from the start of each row: logits `[*b, v]` of the token after each prompt, and the cache that
    holds it; whatever the cache held is forgotten.

    Args:
        params: the tree of `fn.init`.
        tokens: `[*b, s]` ids; rows shorter than s are padded on the right, with any id.
        config: the model's shape.
        cache: of `fn.init_cache`, for rows `*b` and at least s tokens.
        kernels: the operations to run it with.
        lengths: tokens of each row, `[*b]`, from 1 to s; None: s.
        donate: write into the cache that was given, instead of a copy; it must not be used afterwards, and nothing
            be differentiated.

    Raises:
        ValueError: when `tokens` is empty, s exceeds the room in the cache, the cache is of another model or batch, or
            tensors of a donated cache share memory.

    >>> from rlm_mhc import fn
    >>> config = ModelConfig.preset("tiny")
    >>> logits, cache = fn.prefill(fn.init(config), torch.tensor([[1, 2, 3]]), config, fn.init_cache(config, 1, 8))
    >>> logits.shape, cache.lengths
    (torch.Size([1, 4096]), tensor([3]))
    """
    require_entries("tokens", tokens)
    length = tokens.shape[-1]
    _require_fit(cache, tokens.shape[:-1], config, donate)
    if length > cache.size:
        raise ValueError(f"prompt of {length} tokens: the cache has room for 1 to {cache.size}")
    if lengths is None:
        lengths = torch.full(tokens.shape[:-1], length, dtype=torch.int64, device=tokens.device)
    positions = torch.arange(length, dtype=torch.int64, device=tokens.device)
    attend = partial(_attend_prompt, kernels.attention, donate)
    hidden, keys, values = _through(params, tokens, positions, config, cache, kernels, attend)
    last = tree_map(partial(_last, lengths), hidden)
    logits = head(params, last, config, kernels).squeeze(-2)
    return logits, Cache(keys, values, lengths.to(cache.lengths.dtype))


def decode_step(
    params: LMParams,
    tokens: PerRow,
    config: ModelConfig,
    cache: Cache,
    kernels: Kernels = REFERENCE,
    *,
    donate: bool = False,
) -> tuple[NextLogits, Cache]:
    """Read one more token in each row, at the row's own position: logits `[*b, v]` of the one after it, and the cache.

    Equals `fn.forward` over all tokens of the row, at its last position. `kernels.attention` is not used: what the
    cache holds is read by `cached_attention`.

    Args:
        params: the tree of `fn.init`.
        tokens: `[*b]` ids.
        config: the model's shape.
        cache: what `fn.prefill` or the last step returned; its rows have room for another token each.
        kernels: the operations to run it with.
        donate: as in `prefill`.

    Raises:
        ValueError: as in `prefill`, and when a row of the cache is full; where that cannot be known without
            waiting for the device or under a transform, it is PyTorch's error of an index.

    >>> from rlm_mhc import fn
    >>> config = ModelConfig.preset("tiny")
    >>> params = fn.init(config)
    >>> logits, cache = fn.prefill(params, torch.tensor([[1, 2, 3]]), config, fn.init_cache(config, 1, 8))
    >>> logits, cache = fn.decode_step(params, logits.argmax(-1), config, cache)
    >>> cache.lengths
    tensor([4])
    """
    _require_fit(cache, tokens.shape, config, donate)
    _require_room(cache)
    positions = cache.lengths.unsqueeze(-1)
    visible = torch.arange(cache.size, dtype=torch.int64, device=tokens.device) <= positions
    attend = partial(_attend_cache, cache.lengths, visible, donate)
    hidden, keys, values = _through(params, tokens.unsqueeze(-1), positions, config, cache, kernels, attend)
    return head(params, hidden, config, kernels).squeeze(-2), Cache(keys, values, cache.lengths + 1)


def cached_attention(
    q: Float[Tensor, "*b h 1 d"],
    keys: Float[Tensor, "*b kv places d"],
    values: Float[Tensor, "*b kv places d"],
    visible: Bool[Tensor, "*b places"],
) -> Float[Tensor, "*b h 1 d"]:
    """`softmax(q · keysᵀ / sqrt(d)) · values` over the places that are `visible`, for one query a row.

    Query head `i` reads key/value head `i // (h / kv)`. The heads of a group stand side by side as if they were
    positions, so that nothing of the cache is repeated for them.

    >>> visible = torch.tensor([[True, True, False]])
    >>> cached_attention(torch.ones(1, 4, 1, 2), *[torch.ones(1, 2, 3, 2)] * 2, visible)[0, 0]
    tensor([[1., 1.]])
    """
    grouped = rearrange(q, "... (kv group) 1 d -> ... kv group d", kv=keys.shape[-3])
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible[..., None, None, :])
    return rearrange(out, "... kv group d -> ... (kv group) 1 d")


# Functions of their own rather than nested ones: a hook that checks shapes wraps those again at each call.
def _attend_prompt(
    attention: Callable[..., Tensor], donate: bool, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return attention(q, k, v), write_first(keys, k, donate), write_first(values, v, donate)


def _attend_cache(
    lengths: Tensor, visible: Tensor, donate: bool, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = write_at(keys, k, lengths, donate), write_at(values, v, lengths, donate)
    return cached_attention(q, keys.to(q.dtype), values.to(q.dtype), visible), keys, values


def _keep(attend: Attend, cached: list[Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What attention gives, with the new keys and values left in `cached` for the caller: a branch of a
    hyper-connection returns its output alone."""
    output, cached[0], cached[1] = attend(*cached, q, k, v)
    return output


def _through(
    params: LMParams,
    tokens: Tensor,
    positions: Tensor,
    config: ModelConfig,
    cache: Cache,
    kernels: Kernels,
    attend: Attend,
) -> tuple[Hidden, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What the blocks give for tokens at positions, and the keys and values of all layers with theirs."""
    cos, sin = rotary_table(positions, config.head_width, config.rope_theta)
    hidden, written = embed(params, tokens, config), []
    for layer, *both in zip(params.layers, cache.keys, cache.values, strict=True):
        cached = list(both)  # which the compiler of PyTorch 2.11 takes for a tuple
        own = kernels._replace(attention=partial(_keep, attend, cached))
        hidden = block(layer, hidden, cos, sin, config, own).hidden
        written.append(cached)
    keys, values = zip(*written, strict=True)
    return hidden, keys, values


def _last(lengths: Tensor, x: Tensor) -> Tensor:
    """Each row's last token: `[*b, s, …] -> [*b, 1, …]`."""
    axis = lengths.dim()
    index = (lengths - 1).reshape(*lengths.shape, *(1,) * (x.dim() - axis))
    return x.take_along_dim(index.expand(*lengths.shape, 1, *x.shape[axis + 1 :]), dim=axis)


def _require_fit(cache: Cache, batch: torch.Size, config: ModelConfig, donate: bool) -> None:
    expected = (*batch, config.kv_heads, cache.size, config.head_width)
    if len(cache.keys) != config.num_layers or cache.keys[0].shape != expected:
        raise ValueError(
            f"cache of {len(cache.keys)} layers of {tuple(cache.keys[0].shape)}: these tokens and this model need "
            f"{config.num_layers} of {expected}; make it by fn.init_cache"
        )
    # In a graph and under transforms tensors have no address.
    addressed = donate and not torch.compiler.is_compiling() and not is_transformed(cache.keys[0])
    if addressed and (places := overlap([*cache.keys, *cache.values])):
        names = [f"cache.{name}[{layer}]" for name in ("keys", "values") for layer in range(config.num_layers)]
        one, other = (names[place] for place in places)
        raise ValueError(f"{one} and {other} share memory, and donate=True writes in place; clone one of them")


def _require_room(cache: Cache) -> None:
    # A value on another device would have to be waited for; under vmap and in a graph there is none.
    known = cache.lengths.is_cpu and not torch.compiler.is_compiling() and not is_transformed(cache.lengths)
    if known and bool((cache.lengths >= cache.size).any()):
        raise ValueError(f"a row holds {int(cache.lengths.max())} tokens: the cache has room for {cache.size}")
