"""The modules of a transformer block: they own the weights under their dotted names, `fn` computes."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from rlm_mhc import fn
from rlm_mhc.config import ModelConfig
from rlm_mhc.model.mhc import add_weights, mHCLayer, weights_of
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


def norm_tree(module: Any) -> Any:
    """A plain `Norm` as its weight; anything else as the function it is."""
    return RMSNorm(module.weight) if _is_plain(module, Norm) else module


def tree_of(module: Any, kind: type) -> Any:
    """A plain module of a kind as its weights; anything else, hooked or wrapped, as the function it is."""
    return module.tree() if _is_plain(module, kind) else module


def _is_plain(module: nn.Module, kind: type) -> bool:
    # A hook, or a forward of its own as accelerate gives to modules, has to run.
    own = module.__dict__
    return type(module) is kind and "forward" not in own and not any(own[hooks] for hooks in HOOKS)


class Norm(nn.Module):
    """An RMS norm."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """`[*b, c] -> [*b, c]`."""
        return fn.rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{len(self.weight)}, eps={self.eps}"


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
            self.q_norm, self.k_norm = Norm(width, config.norm_eps), Norm(width, config.norm_eps)

    def tree(self) -> SelfAttention:
        """The weights as `fn` takes them."""
        projections = (linear_tree(module) for module in (self.q_proj, self.k_proj, self.v_proj, self.o_proj))
        norms = (norm_tree(module) for module in (self.q_norm, self.k_norm)) if hasattr(self, "q_norm") else ()
        return SelfAttention(*projections, *norms)

    def forward(self, x: Tensor, context: fn.Context, cache: Any, attend: Any, normalise: Any) -> fn.Attended:
        """`fn.self_attention`."""
        return fn.self_attention(self.tree(), x, context, cache, attend, normalise)

    def attend(
        self, mask: Any, options: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, context: fn.Context, cache: Any
    ) -> fn.Attended:
        """Attend as `attn_implementation` says, over transformers' cache; beside the output its weights, or None."""
        if cache is not None:
            # A paged cache reads and extends the options of the attention function.
            paged = {} if isinstance(cache, Cache) else {"kwargs": options}
            k, v = cache.update(k, v, self.layer_idx, **paged)
        run = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = run(self, q, k, v, mask, dropout=0.0, scaling=self.scaling, **options)
        return fn.Attended(output.transpose(1, 2), weights)


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

    def forward(self, x: Tensor) -> Tensor:
        """`fn.swiglu`."""
        return fn.swiglu(self.tree(), x)


class Block(GradientCheckpointingLayer):
    """`fn.block` with weights of its own, attention by what `attn_implementation` names."""

    def __init__(self, config: ModelConfig, layer_idx: int, outer: PretrainedConfig) -> None:
        super().__init__()
        self.shape = config
        if config.mhc_enabled:
            self.attn_mhc, self.mlp_mhc = mhc_layer(config), mhc_layer(config)
        self.input_layernorm = Norm(config.hidden_dim, config.norm_eps)
        self.self_attn = Attention(config, layer_idx, outer)
        self.post_attention_layernorm = Norm(config.hidden_dim, config.norm_eps)
        self.mlp = FeedForward(config)

    def tree(self) -> Layer:
        """The weights as `fn` takes them; where a module is hooked or wrapped, that module in their stead."""
        mhc = self.shape.mhc_enabled
        return Layer(
            attn_mhc=tree_of(self.attn_mhc, mHCLayer) if mhc else (),
            input_layernorm=norm_tree(self.input_layernorm),
            self_attn=tree_of(self.self_attn, Attention),
            mlp_mhc=tree_of(self.mlp_mhc, mHCLayer) if mhc else (),
            post_attention_layernorm=norm_tree(self.post_attention_layernorm),
            mlp=tree_of(self.mlp, FeedForward),
        )

    def forward(
        self,
        hidden: Tensor,
        pre: Tensor | tuple[()],
        cos: Tensor,
        sin: Tensor,
        mask: Any = None,
        cache: Any = None,
        kernels: fn.Kernels = fn.REFERENCE,
        **options: Any,
    ) -> tuple[Tensor, Tensor | tuple[()], Tensor | None]:
        """What comes out of the block, of the form of the first two arguments, and the attention's weights where its
        implementation gives them. No tensor is inside a tuple: reentrant checkpointing would not see it.

        Args:
            hidden: streams `[b, s, n, c]`; without mHC `[b, s, c]`.
            pre: with `single_pass` what aggregates next, `[b, s, n]`; else `()`.
            cos: rotary table of the positions, `[b, s, d/2]`, as is `sin`.
            sin: see there.
            mask: what `attn_implementation` takes.
            cache: transformers' keys and values, which are added to.
            kernels: the operations to run it with; its attention is not used.
            **options: for the attention function.
        """
        attend = partial(self.self_attn.attend, mask, options)
        context, state = fn.Context(cos, sin), fn.Hidden(hidden, pre)
        after, _, weights = fn.block(self.tree(), state, context, self.shape, kernels, cache, attend)
        return *after, weights


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

    phi: Tensor
    alpha: Tensor
    bias: Tensor

    def __init__(self, specs: Any, config: ModelConfig) -> None:
        super().__init__()
        self.shape = config
        add_weights(self, specs)

    def tree(self) -> fn.MHCHead:
        """The weights as `fn` takes them."""
        return weights_of(self, fn.MHCHead)

    def forward(self, streams: Tensor) -> Tensor:
        """`[*b, n, c] -> [*b, c]`."""
        return fn.collapse_learned(self.tree(), streams, eps=self.shape.norm_eps, preset=self.shape.mhc_preset)
