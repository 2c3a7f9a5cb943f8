"""Drawing the next token: what the logits are turned into first, and the draw."""

import dataclasses
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rlm_mhc.fn.norm import widen
from rlm_mhc.types import NextLogits, PerRow
from rlm_mhc.validation import at_least, between, build, check, positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn. Whatever is not None or 1 applies, in the order of the fields, which is transformers'.

    - `repetition_penalty`: what a positive logit of a token seen before is divided by, a negative one multiplied
    - `temperature`: what logits are divided by; 0: the likeliest token is taken, which none of the rest would remove
    - `top_k`: only so many likeliest tokens
    - `top_p`: only the likeliest tokens that together have this probability
    - `min_p`: only tokens with at least this share of the likeliest one's probability

    Raises:
        ValueError: naming the field, its value and what is allowed.

    Source: transformers' `RepetitionPenaltyLogitsProcessor` (Keskar et al., arXiv 1909.05858), `TopKLogitsWarper`,
    `TopPLogitsWarper` (Holtzman et al., arXiv 1904.09751), `MinPLogitsWarper` (Nguyen et al., arXiv 2407.01082).

    >>> Sampling(top_p=0.9)
    Sampling(repetition_penalty=1.0, temperature=1.0, top_k=None, top_p=0.9, min_p=None)
    """

    repetition_penalty: float = positive(1.0)
    temperature: float = at_least(0, 1.0)
    top_k: int | None = at_least(1, None)
    top_p: float | None = between(0, 1, None)
    min_p: float | None = between(0, 1, None)

    def __post_init__(self) -> None:
        check(self)


def sample_token(
    logits: NextLogits,
    generator: torch.Generator | None = None,
    seen: Bool[Tensor, "*b v"] | None = None,
    **sampling: Any,
) -> PerRow:
    """One token per row, drawn from `softmax(filter_logits(logits))`, or the likeliest at temperature 0.

    Args:
        logits: `[*b, v]`.
        generator: of the draw; None: PyTorch's own.
        seen: `[*b, v]`, the tokens that `repetition_penalty` applies to.
        **sampling: fields of `Sampling`.

    Raises:
        ValueError: as `Sampling`, and on a repetition penalty without `seen`.

    >>> sample_token(torch.tensor([0.0, 5.0, 1.0]), temperature=0.0)
    tensor(1)
    """
    return draw(logits, build(Sampling, sampling), generator, seen)


def draw(
    logits: NextLogits, sampling: Sampling, generator: torch.Generator | None, seen: Bool[Tensor, "*b v"] | None
) -> PerRow:
    """`sample_token` by a `Sampling` that is checked already."""
    if sampling.temperature == 0:
        return _penalised(logits, sampling, seen).argmax(-1)
    probabilities = filter_logits(logits, sampling, seen).softmax(-1)
    drawn = torch.multinomial(probabilities.reshape(-1, logits.shape[-1]), 1, generator=generator)
    return drawn.view(logits.shape[:-1])


def filter_logits(logits: NextLogits, sampling: Sampling, seen: Bool[Tensor, "*b v"] | None = None) -> NextLogits:
    """The logits that a token is drawn from, in fp32 or wider; -inf at what cannot be drawn. Some token always can.

    >>> filter_logits(torch.tensor([1.0, 3.0, 2.0]), Sampling(temperature=0.5, top_k=2))
    tensor([-inf, 6., 4.])
    """
    scores = _penalised(widen(logits), sampling, seen) / sampling.temperature
    filters: Any = ((sampling.top_k, keep_top_k), (sampling.top_p, keep_top_p), (sampling.min_p, keep_min_p))
    for value, keep in filters:
        if value is not None:
            scores = scores.masked_fill(~keep(scores, value), -torch.inf)
    return scores


def _penalised(logits: Tensor, sampling: Sampling, seen: Tensor | None) -> Tensor:
    penalty = sampling.repetition_penalty
    if penalty == 1:
        return logits
    if seen is None:
        raise ValueError(f"repetition_penalty={penalty}: needs seen, the tokens that it applies to")
    return penalise(logits, seen, penalty)


def penalise(logits: NextLogits, seen: Bool[Tensor, "*b v"], penalty: float) -> NextLogits:
    """Logits of tokens seen before divided by the penalty where positive, multiplied where negative.

    >>> penalise(torch.tensor([2.0, -2.0, 2.0]), torch.tensor([True, True, False]), 2.0)
    tensor([ 1., -4.,  2.])
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(scores: NextLogits, k: int) -> Bool[Tensor, "*b v"]:
    """True at the k largest scores, and at those that equal the smallest of them.

    >>> keep_top_k(torch.tensor([1.0, 3.0, 2.0]), 2)
    tensor([False,  True,  True])
    """
    return scores >= scores.topk(min(k, scores.shape[-1]), dim=-1).values[..., -1:]


def keep_top_p(scores: NextLogits, p: float) -> Bool[Tensor, "*b v"]:
    """True at the fewest of the likeliest tokens whose probabilities sum to at least p, and at one at least.

    >>> keep_top_p(torch.tensor([0.5, 0.1, 0.4]).log(), 0.8)
    tensor([ True, False,  True])
    """
    ordered, order = scores.sort(dim=-1)
    kept = ordered.softmax(-1).cumsum(-1) > 1 - p
    last = torch.arange(scores.shape[-1], dtype=torch.int64, device=scores.device) == scores.shape[-1] - 1
    return torch.zeros_like(kept).scatter(-1, order, kept | last)


def keep_min_p(scores: NextLogits, p: float) -> Bool[Tensor, "*b v"]:
    """True at tokens of at least p times the probability of the likeliest.

    >>> keep_min_p(torch.tensor([0.5, 0.1, 0.4]).log(), 0.5)
    tensor([ True, False,  True])
    """
    probabilities = scores.softmax(-1)
    return probabilities >= p * probabilities.amax(-1, keepdim=True)


def mark(seen: Bool[Tensor, "b v"], tokens: Int[Tensor, "b s"], counted: Bool[Tensor, "b s"]) -> Bool[Tensor, "b v"]:
    """`seen`, with True also at the tokens of each row that are counted.

    >>> mark(torch.zeros(1, 3, dtype=torch.bool), torch.tensor([[2, 0]]), torch.tensor([[True, False]]))
    tensor([[False, False,  True]])
    """
    times = torch.zeros(seen.shape, dtype=torch.int32, device=seen.device)
    return seen | (times.scatter_add(-1, tokens, counted.to(torch.int32)) > 0)
