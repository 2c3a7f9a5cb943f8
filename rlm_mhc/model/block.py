"""The modules of a transformer block: they own the weights under their dotted names, `fn` computes."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from rlm_mhc import fn
from rlm_mhc.config import ModelConfig
from rlm_mhc.model.mhc import mHCLayer
from rlm_mhc.params import MLP, Embedding, Layer, Linear, RMSNorm, SelfAttention

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def linear_tree(module: Any) -> Any:
    """A plain `nn.Linear` as its weights; anything else, an adapter or a quantised layer, as the function it is."""
    if not _is_plain(module, nn.Linear):
        return module
    bias = module.bias
    return Linear(module.weight, () if bias is None else bias)


def embedding_tree(module: Any) -> Any:
    """A plain `nn.Embedding` as its weight; anything else as the function it is."""
    return Embedding(module.weight) if _is_plain(module, nn.Embedding) else module


def _is_plain(module: nn.Module, kind: type) -> bool:
    # A hook, or a forward of its own as accelerate gives to modules, has to run.
    own = module.__dict__
    return type(module) is kind and "forward" not in own and not any(own[hooks] for hooks in HOOKS)


class Norm(nn.Module):
    """The weight of an RMS norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Attention(nn.Module):
    """The weights of causal attention, and what transformers' attention functions ask of a module."""

    is_causal = True

    def __init__(self, config: ModelConfig, layer_idx: int, outer: PretrainedConfig) -> None:
        super().__init__()
        width, own, shared = config.head_width, config.num_heads, config.kv_heads
        self.config, self.layer_idx = outer, layer_idx
        self.num_key_value_groups, self.scaling = own // shared, width**-0.5
        self.q_proj = nn.Linear(config.hidden_dim, own * width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_dim, shared * width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_dim, shared * width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(own * width, config.hidden_dim, bias=False)
        if config.qk_norm:
            self.q_norm, self.k_norm = Norm(width), Norm(width)

    def tree(self) -> SelfAttention:
        """The weights as `fn` takes them."""
        projections = (linear_tree(module) for module in (self.q_proj, self.k_proj, self.v_proj, self.o_proj))
        norms = (RMSNorm(module.weight) for module in (self.q_norm, self.k_norm)) if hasattr(self, "q_norm") else ()
        return SelfAttention(*projections, *norms)


class FeedForward(nn.Module):
    """The weights of SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_dim, config.ffn_width, bias=False)
        self.up_proj = nn.Linear(config.hidden_dim, config.ffn_width, bias=False)
        self.down_proj = nn.Linear(config.ffn_width, config.hidden_dim, bias=False)

    def tree(self) -> MLP:
        """The weights as `fn` takes them."""
        return MLP(linear_tree(self.gate_proj), linear_tree(self.up_proj), linear_tree(self.down_proj))


class Block(GradientCheckpointingLayer):
    """`fn.block` with weights of its own, attention by what `attn_implementation` names."""

    def __init__(self, config: ModelConfig, layer_idx: int, outer: PretrainedConfig) -> None:
        super().__init__()
        self.shape = config
        if config.mhc_enabled:
            self.attn_mhc, self.mlp_mhc = mhc_layer(config), mhc_layer(config)
        self.input_layernorm = Norm(config.hidden_dim)
        self.self_attn = Attention(config, layer_idx, outer)
        self.post_attention_layernorm = Norm(config.hidden_dim)
        self.mlp = FeedForward(config)

    def tree(self) -> Layer:
        """The weights as `fn` takes them."""
        mhc = self.shape.mhc_enabled
        return Layer(
            attn_mhc=self.attn_mhc.tree() if mhc else (),
            input_layernorm=RMSNorm(self.input_layernorm.weight),
            self_attn=self.self_attn.tree(),
            mlp_mhc=self.mlp_mhc.tree() if mhc else (),
            post_attention_layernorm=RMSNorm(self.post_attention_layernorm.weight),
            mlp=self.mlp.tree(),
        )

    def forward(
        self, hidden: Any, cos: Tensor, sin: Tensor, mask: Any = None, cache: Any = None, **options: Any
    ) -> tuple[Any, Tensor | None]:
        """What comes out of the block, and the attention's weights where its implementation gives them.

        Args:
            hidden: streams `[b, s, n, c]`; without mHC `[b, s, c]`; with `single_pass` an `fn.EarlyPre`.
            cos: rotary table of the positions, `[b, s, d/2]`, as is `sin`.
            sin: see there.
            mask: what `attn_implementation` takes.
            cache: transformers' keys and values, which are added to.
            **options: for the attention function.
        """
        site, seen = self.self_attn, []

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if cache is not None:
                k, v = cache.update(k, v, site.layer_idx)
            run = ALL_ATTENTION_FUNCTIONS.get_interface(site.config._attn_implementation, eager_attention_forward)
            output, weights = run(site, q, k, v, mask, dropout=0.0, scaling=site.scaling, **options)
            seen.append(weights)
            return output.transpose(1, 2)

        kernels = fn.REFERENCE._replace(attention=attention)
        return fn.block(self.tree(), hidden, cos, sin, self.shape, kernels).hidden, seen[0]


def mhc_layer(config: ModelConfig) -> mHCLayer:
    """The hyper-connection of one sub-layer of a model."""
    return mHCLayer(
        config.hidden_dim,
        config.mhc_flows,
        num_iters=config.mhc_sinkhorn_iters,
        preset=config.mhc_preset,
        projection=config.mhc_projection,
        norm_eps=config.norm_eps,
    )


class Head(nn.Module):
    """The weights by which streams are collapsed, where that is learned."""

    def __init__(self, specs: Any) -> None:
        super().__init__()
        self.phi, self.alpha, self.bias = (
            nn.Parameter(torch.empty(spec.shape, dtype=spec.dtype(torch.get_default_dtype()))) for spec in specs
        )

    def tree(self) -> fn.MHCHead:
        """The weights as `fn` takes them."""
        return fn.MHCHead(self.phi, self.alpha, self.bias)
