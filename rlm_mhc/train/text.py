"""Text of a model."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch

from rlm_mhc.config import ModelConfig
from rlm_mhc.data.tokenizer import bos_ids, id_bound
from rlm_mhc.fn import Decoder, LMParams, generate

CONTEXT = 5


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
    stop_token_ids: Sequence[int] = (),
    decoder: Decoder | None = None,
) -> str:
    """Return `prompt` and a continuation of at most `tokens` tokens, which ends early at end of text, at one of
    `stop_token_ids` and where the model's positions end."""
    stops = [tokenizer.eos_token_id, *stop_token_ids]
    device = params.norm.weight.device
    ids = encode(tokenizer, prompt)
    new = min(tokens, config.max_seq_len - len(ids))
    if new < 1:
        return prompt
    generator = torch.Generator(device).manual_seed(seed)
    out = generate(
        params,
        torch.tensor([ids], dtype=torch.int64, device=device),
        config,
        max_new_tokens=new,
        stop_tokens=stops,
        generator=generator,
        vocab_size=id_bound(tokenizer),
        temperature=temperature,
        top_k=top_k,
        decoder=decoder,
    )
    return prompt + "".join(text_pieces(tokenizer, out.tokens[0, len(ids) : out.lengths[0]].tolist(), ids, stops))


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """Return the ids of a prompt, which begins as the tokenizer begins every text, if it does not spell that itself.
    Where the tokenizer begins texts with nothing, an empty prompt is end of text, after which a document begins.

    Raises:
        ValueError: on a prompt with bytes that are no text, as a command line may have them.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError(f"prompt={prompt!a}: it has bytes that are no text in UTF-8") from None
    ids, first = tokenizer(prompt, add_special_tokens=False)["input_ids"], bos_ids(tokenizer)
    return (ids if ids[:1] == first else first + ids) or [tokenizer.eos_token_id]


def text_pieces(
    tokenizer: Any, tokens: Iterable[int], before: list[int], stop_tokens: Collection[int]
) -> Iterator[str]:
    """The text of tokens as it becomes known: a character whose bytes lie in several tokens comes with the last.

    Args:
        tokenizer: theirs.
        tokens: ids, up to the first stop token, which is none of the text.
        before: what came before them: some tokenizers write a word differently at the start of a text.
        stop_tokens: at which generation ends.
    """
    ids, start, told = list(before), max(0, len(before) - CONTEXT), len(before)
    for token in tokens:
        if token in stop_tokens:
            break
        ids.append(token)
        # What ends in the sign for bytes that are no character may become one with the next token.
        if not tokenizer.decode(ids[start:]).endswith("�"):
            yield _after(tokenizer, ids, start, told)
            start, told = told, len(ids)
    if told < len(ids):
        yield _after(tokenizer, ids, start, told)


def _after(tokenizer: Any, ids: list[int], start: int, told: int) -> str:
    return tokenizer.decode(ids[start:])[len(tokenizer.decode(ids[start:told])) :]
