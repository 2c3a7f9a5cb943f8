"""Instruction data: a JSON record as spans of text, those that the loss counts and those that it does not."""

from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

from rlm_mhc.data.chat import turns
from rlm_mhc.data.messages import CHAT, conversation, takes_objects, unused_keys
from rlm_mhc.data.sources import BadLines, Parse, record_source, string_field
from rlm_mhc.data.tokenizer import special_tokens

FORMATS = ("auto", "text", "completion", "chat")
COMPLETION = '{"prompt": "…", "completion": "…"}'
ONE_FORMAT = "all lines of a data set have one format, that of the first good one or of data.format"


class Span(NamedTuple):
    """A text whose boundaries are those of tokens; `counted`: the loss is on them."""

    text: str
    counted: bool


class Example(NamedTuple):
    """Spans in their order, none of them empty, and `where` they were read, for errors.

    `rendered`: a template wrote them, special tokens and all. Otherwise what spells such a token are letters, and an
    example begins as the tokenizer begins every text. `closed`: the spans end as they are to end; otherwise end of
    text, which counts, follows. `unused`: keys of the record that have no effect.
    """

    spans: tuple[Span, ...]
    rendered: bool
    where: str
    closed: bool = False
    unused: frozenset[str] = frozenset()


def find_format(path: str, text_field: str, key: str = "data.train_path") -> str:
    """`chat`, `completion` or `text`, told by the fields of the first line of a data set that has any of these.

    A line of several counts as the first of them, since the text is then what the others were rendered to.

    Raises:
        FileNotFoundError: when nothing matches the path.
        ValueError: when no line tells.
    """
    expected = f'{{"{text_field}": "…"}}, {COMPLETION} or {CHAT}'

    def read(record: dict[str, Any], where: str) -> str:
        if "messages" in record:
            return "chat"
        if "prompt" in record and "completion" in record:
            return "completion"
        return "text" if string_field(record, text_field, where, f"expected {expected}") is not None else ""

    bad = BadLines(strict=False, max_fraction=1.0)
    for found in record_source(path, Parse(read, expected, "format"), key=key).read(bad):
        return found
    raise ValueError(bad.first or f"{key}={path}: it has no line; expected {expected}")


def completion_parse() -> Parse:
    """`{"prompt", "completion"}` as the prompt and the completion, on which the loss is.

    >>> completion_parse().read({"prompt": "1+1=", "completion": "2"}, "line 1").spans
    (Span(text='1+1=', counted=False), Span(text='2', counted=True))
    """

    def read(record: dict[str, Any], where: str) -> Example:
        prompt, completion = (string_field(record, name, where, ONE_FORMAT) for name in ("prompt", "completion"))
        if not completion:
            raise ValueError(f"{where}: field 'completion' is empty, so there is nothing to learn")
        parts = Span(prompt, False), Span(completion, True)
        return Example(tuple(part for part in parts if part.text), False, where)

    return Parse(read, COMPLETION, "completion")


def chat_parse(tokenizer: Any) -> Parse:
    """`{"messages"}` as the tokenizer's chat template renders them, the loss being on what the assistant says.

    A message of the assistant with weight 0 does not count. A record's `tools`, where it has some, go to the template
    too. Where the template ends the last turn with no special token, end of text follows it, and counts.
    """
    special, objects = tuple(special_tokens(tokenizer)), takes_objects(tokenizer)

    def read(record: dict[str, Any], where: str) -> Example:
        messages, counted, tools = conversation(record, where, ONE_FORMAT, objects=objects)
        parts, closed = turns(tokenizer, messages, counted, tools, special, where)
        unused = unused_keys(record, tokenizer.get_chat_template(tools=tools))
        return Example(_segments(parts, special), True, where, closed, frozenset(unused))

    return Parse(read, CHAT, ["chat", tokenizer.chat_template])


def _segments(parts: list[tuple[str, bool]], special: tuple[str, ...]) -> tuple[Span, ...]:
    """Space behind the token that ends a turn is the template's, not the assistant's: it does not count."""
    cut = []
    for text, counted in parts:
        body = text.rstrip()
        if not counted or not body.endswith(special):
            body = text
        cut += [(body, counted), (text[len(body) :], False)]
    runs = groupby((part for part in cut if part[0]), itemgetter(1))
    return tuple(Span("".join(text for text, _ in run), counted) for counted, run in runs)
