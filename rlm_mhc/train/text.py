"""Sample text of a model, by a full forward per token."""

from typing import Any

import torch

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn import LMParams, forward, sample_token


@torch.no_grad()
def sample_text(
    params: LMParams,
    config: ModelConfig,
    tokenizer: Any,
    prompt: str,
    *,
    tokens: int = 60,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
) -> str:
    """`prompt` and a continuation of at most `tokens` tokens, ending early at end of text; one forward per token."""
    device = params.norm.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    window = torch.tensor([ids], device=device)
    for _ in range(tokens):
        logits = forward(params, window[:, -config.max_seq_len :], config)[:, -1, : len(tokenizer)]
        token = sample_token(logits, generator, temperature=temperature, top_k=top_k)
        if token.item() == tokenizer.eos_token_id:
            break
        window = torch.cat([window, token.unsqueeze(-1)], dim=-1)
    return tokenizer.decode(window[0].tolist())
