"""Reading a prompt into a cache, and going on from there token by token."""

from functools import partial

import torch
from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.attention import Attend, Attended, masked_attention
from rlm_mhc.fn.block import block
from rlm_mhc.fn.cache import Cache, LayerCache, write
from rlm_mhc.fn.context import Context
from rlm_mhc.fn.kernels import REFERENCE, Kernels
from rlm_mhc.fn.layout import overlap, require_entries
from rlm_mhc.fn.lm import embed, head
from rlm_mhc.fn.rope import rotary_table
from rlm_mhc.fn.transforms import is_transformed
from rlm_mhc.params import LMParams
from rlm_mhc.tree import tree_map
from rlm_mhc.types import NextLogits, PerRow, Tokens


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
    holds it; whatever the cache held is forgotten. This is `extend` of an empty cache, by `kernels.attention`.

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
    length = _require_fit(cache, tokens, config, donate)
    lengths = _require_lengths(lengths, tokens)
    if length > cache.size:
        raise ValueError(f"prompt of {length} tokens: the cache has room for 1 to {cache.size}")
    at = torch.arange(length, dtype=torch.int64, device=tokens.device)
    places = at.expand(tokens.shape)
    return _read(params, tokens, at, lengths, config, cache, kernels, partial(_attend_prompt, kernels, places, donate))


def extend(
    params: LMParams,
    tokens: Tokens,
    config: ModelConfig,
    cache: Cache,
    kernels: Kernels = REFERENCE,
    *,
    lengths: PerRow | None = None,
    donate: bool = False,
) -> tuple[NextLogits, Cache]:
    """Append tokens to each row, at the row's own positions: logits `[*b, v]` of the token after each row's last, and
    the cache.

    Equals `fn.forward` over all tokens of the row, at its last position. `kernels.attention` is not used: keys and
    values are read by `masked_attention`.

    Args:
        params: the tree of `fn.init`.
        tokens: `[*b, s]` ids; rows with fewer than s new tokens are padded on the right, with any id.
        config: the model's shape.
        cache: of `fn.init_cache`, `fn.prefill` or the last `fn.extend`; its rows have room for the new tokens.
        kernels: the operations to run it with.
        lengths: new tokens of each row, `[*b]`, from 1 to s; None: s.
        donate: as in `prefill`.

    Raises:
        ValueError: as in `prefill`, and when a row of the cache has no room; where that cannot be known without
            waiting for the device or under a transform, it is PyTorch's error of an index.

    >>> from rlm_mhc import fn
    >>> config = ModelConfig.preset("tiny")
    >>> params = fn.init(config)
    >>> _, cache = fn.prefill(params, torch.tensor([[1, 2, 3]]), config, fn.init_cache(config, 1, 8))
    >>> logits, cache = fn.extend(params, torch.tensor([[4, 5]]), config, cache)
    >>> cache.lengths
    tensor([5])
    """
    length = _require_fit(cache, tokens, config, donate)
    new = _require_lengths(lengths, tokens)
    _require_room(cache, new)
    order = torch.arange(length, dtype=torch.int64, device=tokens.device)
    seen = cache.lengths.unsqueeze(-1)
    at = seen + order
    visible = torch.arange(cache.size, dtype=torch.int64, device=tokens.device) <= at.unsqueeze(-1)
    if lengths is not None:
        # Padding may stand beyond the end of the cache: the last token is written again in its stead.
        order = torch.minimum(order, lengths.unsqueeze(-1) - 1)
    attend = partial(_attend_cache, visible, None if lengths is None else order, seen + order, donate)
    logits, after = _read(params, tokens, at, new, config, cache, kernels, attend)
    return logits, after._replace(lengths=cache.lengths + new)


def decode_step(
    params: LMParams,
    tokens: PerRow,
    config: ModelConfig,
    cache: Cache,
    kernels: Kernels = REFERENCE,
    *,
    donate: bool = False,
) -> tuple[NextLogits, Cache]:
    """`extend` by one token `[*b]` in each row.

    >>> from rlm_mhc import fn
    >>> config = ModelConfig.preset("tiny")
    >>> params = fn.init(config)
    >>> logits, cache = fn.prefill(params, torch.tensor([[1, 2, 3]]), config, fn.init_cache(config, 1, 8))
    >>> logits, cache = fn.decode_step(params, logits.argmax(-1), config, cache)
    >>> cache.lengths
    tensor([4])
    """
    return extend(params, tokens.unsqueeze(-1), config, cache, kernels, donate=donate)


def _attend_prompt(
    kernels: Kernels, places: Tensor, donate: bool, q: Tensor, k: Tensor, v: Tensor, context: Context, cache: LayerCache
) -> Attended:
    """Attend among the tokens of a prompt, and write their keys and values."""
    written = LayerCache(write(cache.keys, k, places, donate), write(cache.values, v, places, donate))
    return Attended(kernels.attention(q, k, v), written)


def _attend_cache(
    visible: Tensor,
    order: Tensor | None,
    places: Tensor,
    donate: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: Context,
    cache: LayerCache,
) -> Attended:
    """Write keys and values, and attend to all that is visible."""
    if order is not None:
        index = order[..., None, :, None]
        k, v = (x.take_along_dim(index.expand_as(x), dim=-2) for x in (k, v))
    keys, values = write(cache.keys, k, places, donate), write(cache.values, v, places, donate)
    output = masked_attention(q, keys.to(q.dtype), values.to(q.dtype), visible)
    return Attended(output, LayerCache(keys, values))


def _read(
    params: LMParams,
    tokens: Tensor,
    at: Tensor,
    new: Tensor,
    config: ModelConfig,
    cache: Cache,
    kernels: Kernels,
    attend: Attend,
) -> tuple[Tensor, Cache]:
    """Run tokens at positions through the model: logits at each row's last of `new` tokens, and a cache of as many."""
    context = Context(*rotary_table(at, config.head_width, config.rope_theta))
    hidden, written = embed(params, tokens, config), []
    for layer, keys, values in zip(params.layers, cache.keys, cache.values, strict=True):
        hidden, _, own = block(layer, hidden, context, config, kernels, LayerCache(keys, values), attend)
        written.append(own)
    last = tree_map(partial(_last, new), hidden) if tokens.shape[-1] > 1 else hidden
    logits = head(params, last, config, kernels).squeeze(-2)
    of_layers = tuple(own.keys for own in written), tuple(own.values for own in written)
    return logits, Cache(*of_layers, new.to(cache.lengths.dtype))


def _last(lengths: Tensor, x: Tensor) -> Tensor:
    """Each row's last token: `[*b, s, …] -> [*b, 1, …]`."""
    axis = lengths.dim()
    index = (lengths - 1).reshape(*lengths.shape, *(1,) * (x.dim() - axis))
    return x.take_along_dim(index.expand(*lengths.shape, 1, *x.shape[axis + 1 :]), dim=axis)


def _require_fit(cache: Cache, tokens: Tensor, config: ModelConfig, donate: bool) -> int:
    """Refuse a cache of another model or batch; return the number of tokens in a row."""
    require_entries("tokens", tokens)
    expected = (*tokens.shape[:-1], config.kv_heads, cache.size, config.head_width)
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
    return tokens.shape[-1]


def _require_lengths(lengths: Tensor | None, tokens: Tensor) -> Tensor:
    """Return the number of tokens in each row."""
    *batch, length = tokens.shape
    if lengths is None:
        return torch.full(batch, length, dtype=torch.int64, device=tokens.device)
    if _is_known(lengths) and (lengths.shape != tuple(batch) or bool(((lengths < 1) | (lengths > length)).any())):
        raise ValueError(f"lengths={lengths.tolist()}: expected {batch} numbers from 1 to {length}, the tokens' width")
    return lengths


def _require_room(cache: Cache, new: Tensor) -> None:
    if _is_known(cache.lengths) and _is_known(new) and bool((cache.lengths + new > cache.size).any()):
        full = int((cache.lengths + new).argmax())
        held, more = (int(x.flatten()[full]) for x in (cache.lengths, new.expand_as(cache.lengths)))
        raise ValueError(f"a row holds {held} tokens and gets {more} more: the cache has room for {cache.size}")


def _is_known(x: Tensor) -> bool:
    # A value on another device would have to be waited for; under vmap and in a graph there is none.
    return x.is_cpu and not torch.compiler.is_compiling() and not is_transformed(x)
