"""Decoding with one compiled graph for all positions."""

from typing import Any

from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn import REFERENCE, Cache, Decoder, Kernels, LMParams, extend, prefill
from rlm_mhc.kernels.sinkhorn import mhc_mappings_by_op
from rlm_mhc.program.compile import compile_whole

DECODING = REFERENCE._replace(mhc_mappings=mhc_mappings_by_op)


def make_decoder(
    config: ModelConfig, *, cache_size: int | None = None, kernels: Kernels = DECODING, compiled: bool = True
) -> Decoder:
    """What `fn.generate(…, decoder=…)` runs a model of this config with.

    `extend` is one graph, compiled at its first call for one batch, one number of new tokens, one size of cache and one
    dtype, and used for all positions: they are values of a tensor. It writes keys and values into the cache in place.
    Other shapes are compiled anew, up to eight of them. The prompt, whose length is another every time, is read
    uncompiled.

    Args:
        config: the model's shape.
        cache_size: the one size of caches that it is used with; None: whatever `fn.generate` is asked for.
        kernels: the operations of both.
        compiled: False: uncompiled.

    Raises:
        ValueError: on a size below 1 or beyond `max_seq_len`.

    >>> import torch; from rlm_mhc import fn
    >>> config = ModelConfig.preset("tiny")
    >>> decoder = make_decoder(config, compiled=False)
    >>> out = fn.generate(fn.init(config), torch.tensor([[1, 2]]), config, max_new_tokens=2, decoder=decoder)
    >>> out.lengths
    tensor([4])
    """
    if cache_size is not None and not 1 <= cache_size <= config.max_seq_len:
        raise ValueError(f"cache_size={cache_size}: expected 1 to max_seq_len={config.max_seq_len} of the model")

    def append(params: LMParams, tokens: Tensor, cache: Cache, lengths: Tensor | None) -> tuple[Tensor, Cache]:
        return extend(params, tokens, config, cache, kernels, lengths=lengths, donate=True)

    run = compile_whole(append) if compiled else append

    def require_own(other: ModelConfig) -> None:
        if other != config:
            raise ValueError("config: the decoder was made for another one")

    def read(params: LMParams, tokens: Tensor, other: ModelConfig, cache: Cache, **how: Any) -> tuple[Tensor, Cache]:
        require_own(other)
        return prefill(params, tokens, config, cache, kernels, donate=True, **how)

    def go_on(
        params: LMParams, tokens: Tensor, other: ModelConfig, cache: Cache, lengths: Tensor | None = None
    ) -> tuple[Tensor, Cache]:
        require_own(other)
        return run(params, tokens, cache, lengths)

    return Decoder(read, go_on, cache_size)
