"""Hypothesis strategies: configs and logits. Needs the `dev` extra."""

from collections.abc import Iterable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.variants import PRESETS, PROJECTIONS

BIRKHOFF = [name for name in PROJECTIONS if name != "unconstrained"]


@st.composite
def configs(draw: Any, **fixed: Any) -> ModelConfig:
    """Small models: mHC on or off in every variant, 1 to 5 streams, grouped heads, with biases and norms, tied or not.

    Fields given are fixed; a variant is drawn among those that fit the streams.
    """
    flows = fixed.get("mhc_flows") or draw(st.integers(1, 5))
    preset = fixed.get("mhc_preset") or draw(st.sampled_from(_fitting(PRESETS, flows)))
    chosen = None if PRESETS[preset].fixed else draw(st.sampled_from(_fitting(BIRKHOFF, flows)))
    kv_heads = draw(st.sampled_from([1, 2]))
    fields = dict(
        hidden_dim=draw(st.sampled_from([8, 12, 24])),
        num_layers=draw(st.integers(1, 3)),
        num_heads=kv_heads * draw(st.sampled_from([1, 2])),
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 4, 6])),
        ffn_dim=draw(st.integers(1, 20)),
        vocab_size=draw(st.integers(5, 40)),
        max_seq_len=32,
        tie_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        mhc_enabled=draw(st.sampled_from([False, True, True, True])),
        mhc_flows=flows,
        mhc_preset=preset,
        mhc_projection=chosen,
        mhc_sinkhorn_iters=draw(st.integers(1, 6)),
    )
    return ModelConfig(**(fields | fixed))


def _fitting(names: Iterable[str], n: int) -> list[str]:
    """Of presets or projections those that `n` streams may have."""
    return [name for name in names if PROJECTIONS[PRESETS[name].projection if name in PRESETS else name].fits(n)]


@st.composite
def raw_numbers(
    draw: Any,
    names: Iterable[str],
    *,
    streams: int | None = None,
    batch: tuple[int, ...] | None = None,
    scale: float | None = None,
    largest: float = 3e4,
    dtype: torch.dtype = torch.float32,
) -> tuple[str, int, Tensor]:
    """A projection's name, a number of streams that fits it, and normal raw numbers `[*b, k]` of a scale for it.

    A name may say more than the projection in its first word. No number is beyond `largest`.
    """
    name = draw(st.sampled_from(list(names)))
    rule = PROJECTIONS[name.split()[0]]
    n = streams or draw(st.sampled_from([n for n in (1, 2, 3, 4, 5, 8) if rule.fits(n)]))
    shape = batch if batch is not None else draw(st.sampled_from([(), (1,), (0,), (3,), (2, 3)]))
    scale = scale if scale is not None else draw(st.sampled_from([0.1, 1.0, 10.0, 1e3, largest / 4]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    normal = torch.randn(*shape, rule.raw_size(n), generator=generator, dtype=torch.float64, device="cpu")
    return name, n, (scale * normal).clamp(-largest, largest).to(dtype)


@st.composite
def square_logits(draw: Any, scale: float | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal logits `[*b, n, n]` of a drawn or given scale, n from 1 to 6, any batch shape."""
    n = draw(st.integers(1, 6))
    batch = draw(st.sampled_from([(), (1,), (0,), (3,), (2, 3)]))
    scale = scale if scale is not None else draw(st.sampled_from([0.1, 1.0, 10.0, 1e3, 3e4]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return scale * torch.randn(*batch, n, n, generator=generator, dtype=dtype, device="cpu")
