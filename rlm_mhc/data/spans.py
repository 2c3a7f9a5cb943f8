"""Spans of a text as tokens: a border between two spans is one between tokens."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from rlm_mhc.data.token_file import token_ids

# Behind the first two a text is hardly ever joined with what is before it; behind nothing, never.
NEUTRAL = ("\n", "=", "")


def segment_ids(texts: list[list[str]], tokenizer: Any, *, special: bool) -> Iterator[list[list[int]]]:
    """Yield for each text, given in spans, the ids of every span.

    The first span is tokenized by itself, as generation tokenizes it where it is the prompt. Every other span adds ids
    to the ids of the span before it: tokenized by itself it would begin as a text does, in some tokenizers with a space
    that is not there. Where a token would join the two, as `" yes"` does
    `"a: "` and `"yes"`, the span before keeps the ids that it ends with, and this one has those that it has behind
    a line break.

    Args:
        texts: at least one span each, none of them empty.
        tokenizer: theirs.
        special: whether a special token that is spelled is meant, not its letters.
    """
    wanted = {spans[0] for spans in texts}
    for before, span in (pair for spans in texts for pair in pairwise(spans)):
        wanted |= {before, before + span}
    known = dict(zip(wanted, token_ids(list(wanted), tokenizer, special=special), strict=True))

    def behind(before: str, span: str) -> list[int]:
        added = _added(known[before], known[before + span])
        return behind_neutral(span) if added is None else added

    def behind_neutral(span: str) -> list[int]:
        pairs = (token_ids([text, text + span], tokenizer, special=special) for text in NEUTRAL)
        return next(added for before, joined in pairs if (added := _added(before, joined)) is not None)

    for first, *others in texts:
        yield [known[first], *(behind(*pair) for pair in pairwise([first, *others]))]


def _added(before: list[int], joined: list[int]) -> list[int] | None:
    """What `joined` has behind `before`, or None where it does not begin with that."""
    return joined[len(before) :] if joined[: len(before)] == before else None
