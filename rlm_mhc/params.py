"""The parameter tree of a language model, and the one table that describes every weight.

The table is the tree itself with a `WeightSpec` at each leaf. Initial values, meta trees, counts, names and
weight decay all derive from it.
"""

import dataclasses
import functools
import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.tree import map_named, named_leaves, tree_leaves, tree_map
from rlm_mhc.variants import PRESETS, PROJECTIONS

INIT_STD = 0.02


class Linear(NamedTuple):
    """`y = x · weightᵀ + bias`, `weight: [out, in]`, `bias: [out]` or `()` for none."""

    weight: Tensor
    bias: Tensor | tuple[()] = ()


class Embedding(NamedTuple):
    """`weight: [v, c]`, one row per token."""

    weight: Tensor


class RMSNorm(NamedTuple):
    """`weight: [c]`, the scale after normalisation."""

    weight: Tensor


class MHCParams(NamedTuple):
    """One sub-layer's hyper-connection: `phi: [n·c, 2n+k]`, `alpha: [3]`, `bias: [2n+k]`, split pre | post | res.

    `k` are the raw numbers that `res` is made of: `n²` for Sinkhorn, another number for other projections.
    """

    phi: Tensor
    alpha: Tensor
    bias: Tensor


class MHCHead(NamedTuple):
    """How streams are collapsed by learning: `phi: [n·c, n]`, `alpha: [1]`, `bias: [n]`."""

    phi: Tensor
    alpha: Tensor
    bias: Tensor


class SelfAttention(NamedTuple):
    """Projections of causal attention with grouped heads, and the norms of each head's query and key or `()`."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    q_norm: RMSNorm | tuple[()] = ()
    k_norm: RMSNorm | tuple[()] = ()


class MLP(NamedTuple):
    """SwiGLU: `down(silu(gate(x)) · up(x))`."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear


class Layer(NamedTuple):
    """One transformer block; without mHC both `*_mhc` are `()`."""

    attn_mhc: MHCParams | tuple[()]
    input_layernorm: RMSNorm
    self_attn: SelfAttention
    mlp_mhc: MHCParams | tuple[()]
    post_attention_layernorm: RMSNorm
    mlp: MLP


class LMParams(NamedTuple):
    """A language model; `lm_head` is `()` when the embedding is tied, `head_mhc` where nothing is learned there."""

    embed_tokens: Embedding
    layers: tuple[Layer, ...]
    norm: RMSNorm
    lm_head: Linear | tuple[()]
    head_mhc: MHCHead | tuple[()] = ()


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """Everything there is to know of one weight before it exists.

    `std` is the standard deviation of its normal noise around `mean` (a number, or one per entry).
    `fp32` weights stay at least fp32 in any precision; `decay` ones are subject to weight decay.
    """

    shape: tuple[int, ...]
    std: float = 0.0
    mean: float | tuple[float, ...] = 0.0
    decay: bool = False
    fp32: bool = False

    def dtype(self, compute: torch.dtype) -> torch.dtype:
        """The weight's own dtype where the others have `compute`."""
        return torch.promote_types(compute, torch.float32) if self.fp32 else compute

    def init(self, name: str, seed: int, device: torch.device | str, compute: torch.dtype) -> Tensor:
        """Its initial value, a function of `(seed, name)` alone, whatever the device or the order of creation."""
        dtype = self.dtype(compute)
        if torch.device(device).type == "meta":
            return torch.empty(self.shape, dtype=dtype, device="meta")
        mean = torch.tensor(self.mean, dtype=torch.float64, device="cpu").expand(self.shape)
        if self.std == 0:
            return mean.to(device=device, dtype=dtype, copy=True).contiguous()
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        noise = torch.randn(self.shape, generator=generator, dtype=torch.float32, device="cpu")
        return noise.mul_(self.std).add_(mean).to(device=device, dtype=dtype)


@functools.cache
def weight_table(config: ModelConfig) -> Any:
    """The tree of `WeightSpec`s of a model: an `LMParams` with a spec in place of each tensor.

    >>> weight_table(ModelConfig.preset("tiny")).layers[0].self_attn.q_proj.weight.shape
    (128, 128)
    """
    layer = _layer_table(config)
    matrix = WeightSpec((config.vocab_size, config.hidden_dim), std=INIT_STD, decay=True)
    return LMParams(
        embed_tokens=Embedding(matrix),  # type: ignore[arg-type]
        layers=(layer,) * config.num_layers,
        norm=_norm(config.hidden_dim),
        lm_head=() if config.tie_embeddings else Linear(matrix),  # type: ignore[arg-type]
        head_mhc=_mhc_head(config),
    )


def _layer_table(config: ModelConfig) -> Layer:
    width, ffn = config.hidden_dim, config.ffn_width
    heads, kv_heads, biased = config.num_heads * config.head_width, config.kv_heads * config.head_width, config.qkv_bias
    head_norm = _norm(config.head_width) if config.qk_norm else ()
    # Every block adds two outputs to the stream: this keeps its variance at init independent of depth.
    output_std = INIT_STD / math.sqrt(2 * config.num_layers)
    return Layer(
        attn_mhc=_mhc(config),
        input_layernorm=_norm(width),
        self_attn=SelfAttention(
            q_proj=_linear(heads, width, biased=biased),
            k_proj=_linear(kv_heads, width, biased=biased),
            v_proj=_linear(kv_heads, width, biased=biased),
            o_proj=_linear(width, heads, output_std),
            q_norm=head_norm,
            k_norm=head_norm,
        ),
        mlp_mhc=_mhc(config),
        post_attention_layernorm=_norm(width),
        mlp=MLP(
            gate_proj=_linear(ffn, width),
            up_proj=_linear(ffn, width),
            down_proj=_linear(width, ffn, output_std),
        ),
    )


def _linear(out: int, into: int, std: float = INIT_STD, *, biased: bool = False) -> Linear:
    bias = WeightSpec((out,)) if biased else ()
    return Linear(WeightSpec((out, into), std=std, decay=True), bias)  # type: ignore[arg-type]


def _norm(width: int) -> RMSNorm:
    return RMSNorm(WeightSpec((width,), mean=1.0))  # type: ignore[arg-type]


def _mhc(config: ModelConfig) -> MHCParams | tuple[()]:
    if not config.mhc_enabled:
        return ()
    n, projection = config.mhc_flows, PROJECTIONS[config.projection]
    size = 2 * n + projection.raw_size(n)
    return MHCParams(
        phi=WeightSpec((n * config.hidden_dim, size), std=INIT_STD, decay=True, fp32=True),  # type: ignore[arg-type]
        alpha=WeightSpec((3,), mean=PRESETS[config.mhc_preset].alpha, fp32=True),  # type: ignore[arg-type]
        bias=WeightSpec((size,), mean=_gates(config) + projection.near_identity(n), fp32=True),  # type: ignore[arg-type]
    )


def _gates(config: ModelConfig) -> tuple[float, ...]:
    """Biases with which `pre` is 1/n and `post` 1: equal streams are averaged, so that with alpha = 0 this is the
    plain transformer exactly. Any other sum of `pre` scales the input of the pre-norm, which hides a scale only up
    to its eps."""
    n = config.mhc_flows
    if PRESETS[config.mhc_preset].gates == "tanh":
        return (1 / n,) * n + (1.0,) * n
    return _averaging(n) + (0.0,) * n


def _averaging(n: int) -> tuple[float, ...]:
    """The number whose sigmoid is 1/n, n times."""
    return (-math.log(n - 1) if n > 1 else 0.0,) * n


def _mhc_head(config: ModelConfig) -> MHCHead | tuple[()]:
    preset, n = PRESETS[config.mhc_preset], config.mhc_flows
    if not config.mhc_enabled or preset.collapse != "learned":
        return ()
    return MHCHead(
        phi=WeightSpec((n * config.hidden_dim, n), std=INIT_STD, decay=True, fp32=True),  # type: ignore[arg-type]
        alpha=WeightSpec((1,), mean=preset.alpha, fp32=True),  # type: ignore[arg-type]
        bias=WeightSpec((n,), mean=_averaging(n), fp32=True),  # type: ignore[arg-type]
    )


def init(
    config: ModelConfig, *, seed: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LMParams:
    """The parameter tree with its initial values: `N(0, 0.02²)` matrices, unit norms, `res` close to the identity.

    Output projections have `0.02 / sqrt(2 · num_layers)`; streams start averaged (`pre = 1/n`) and `post = 1`.
    mHC weights are fp32 (fp64 under `dtype=torch.float64`).
    Values depend on `seed` and each weight's name alone. `device="meta"` gives shapes without memory.

    >>> init(ModelConfig.preset("tiny")).layers[0].attn_mhc.alpha
    tensor([0.0100, 0.0100, 0.0100])
    """
    return map_named(lambda name, spec: spec.init(name, seed, device, dtype), weight_table(config))


def decay_mask(config: ModelConfig) -> LMParams:
    """True at each weight that weight decay applies to: matrices, not norms, `alpha` or `bias`."""
    return tree_map(lambda spec: spec.decay, weight_table(config))


def cast(params: LMParams, config: ModelConfig, compute: torch.dtype) -> LMParams:
    """The tree in a compute dtype; mHC weights stay in fp32 or wider."""
    return tree_map(lambda spec, w: w.to(spec.dtype(compute)), weight_table(config), params)


def matrix_dtype(named: Mapping[str, Tensor], config: ModelConfig) -> torch.dtype:
    """Return the dtype that most matrix entries have (mHC excluded); norms may differ.

    >>> config = ModelConfig.preset("tiny")
    >>> matrix_dtype(named_leaves(init(config, dtype=torch.bfloat16)), config)
    torch.bfloat16
    """
    return _matrix_dtypes(named, config).most_common(1)[0][0]


def with_one_matrix_dtype(params: LMParams, config: ModelConfig) -> LMParams:
    """Return the tree; where its matrices have several dtypes, cast to the one that most entries have.

    A product of two dtypes is an error in PyTorch.
    """
    named = named_leaves(params)
    mixed = len(_matrix_dtypes(named, config)) > 1
    return cast(params, config, matrix_dtype(named, config)) if mixed else params


def _matrix_dtypes(named: Mapping[str, Tensor], config: ModelConfig) -> Counter[torch.dtype]:
    sizes: Counter[torch.dtype] = Counter()
    for name, spec in named_leaves(weight_table(config)).items():
        if spec.decay and not spec.fp32:
            sizes[named[name].dtype] += named[name].numel()
    return sizes


def count(config: ModelConfig) -> int:
    """The exact number of parameters.

    >>> count(ModelConfig.preset("tiny"))
    1951684
    """
    return sum(math.prod(spec.shape) for spec in tree_leaves(weight_table(config)))


def names(config: ModelConfig) -> list[str]:
    """Dotted names of all weights: tree path, safetensors key and module attribute alike.

    >>> names(ModelConfig.preset("tiny"))[:2]
    ['embed_tokens.weight', 'layers.0.attn_mhc.phi']
    """
    return list(named_leaves(weight_table(config)))
