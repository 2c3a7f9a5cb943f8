"""Models that are not ours, of a config's shape."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlm_mhc.config import ModelConfig


def llama(config: ModelConfig) -> Any:
    """transformers' `LlamaForCausalLM` of the same shape, freshly initialised; it keeps no cache of keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            use_cache=False,
            hidden_size=config.hidden_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_width,
            intermediate_size=config.ffn_width,
            vocab_size=config.vocab_size,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            max_position_embeddings=config.max_seq_len,
            tie_word_embeddings=config.tie_embeddings,
        )
    )


class Loss(nn.Module):
    """A model that gives logits, with the loss in one piece, so that a compiler sees both."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Tokens and targets `[b, s]` to a scalar."""
        logits = self.model(tokens)
        logits = logits if isinstance(logits, Tensor) else logits.logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class EagerPeer(nn.Module):
    """transformers' Llama layers inside the hyper-connections of the `hyper-connections` package."""

    def __init__(self, config: ModelConfig) -> None:
        from hyper_connections import mc_get_init_and_expand_reduce_stream_functions as connections

        super().__init__()
        model = llama(config)
        connect, self.expand, self.reduce = connections(config.mhc_flows, sinkhorn_iters=config.mhc_sinkhorn_iters)
        self.embed, self.rotary, self.norm, self.head = (
            model.model.embed_tokens,
            model.model.rotary_emb,
            model.model.norm,
            model.lm_head,
        )
        self.sites = nn.ModuleList(
            connect(dim=config.hidden_dim, branch=branch)
            for layer in model.model.layers
            for branch in (Attention(layer), nn.Sequential(layer.post_attention_layernorm, layer.mlp))
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """`[b, s] -> [b, s, v]`."""
        hidden = self.embed(tokens)
        rotary = self.rotary(hidden, torch.arange(tokens.shape[1], dtype=torch.int64, device=tokens.device)[None])
        streams = self.expand(hidden)
        for number, site in enumerate(self.sites):
            streams = site(streams, rotary) if number % 2 == 0 else site(streams)
        return self.head(self.norm(self.reduce(streams)))


class Attention(nn.Module):
    """The attention half of a transformers Llama layer."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.norm, self.attention = layer.input_layernorm, layer.self_attn

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """`[b, s, c] -> [b, s, c]`."""
        return self.attention(self.norm(x), position_embeddings=rotary, attention_mask=None)[0]
