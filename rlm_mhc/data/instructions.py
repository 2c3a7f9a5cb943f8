"""Instruction data: a JSON record as segments of text, those that the loss counts and those that it does not."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from rlm_mhc.data.chat import turns
from rlm_mhc.data.sources import BadLines, Parse, record_source, string_field, whole_characters

FORMATS = ("auto", "text", "completion", "chat")
COMPLETION = '{"prompt": "…", "completion": "…"}'
CHAT = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
ONE_FORMAT = "all lines of a data set have one format, that of the first good one or of data.format"


class Segment(NamedTuple):
    """A text that is tokenized by itself, so that its boundaries are those of tokens.

    `counted`: the loss is on its tokens. `special`: a special token spelled in it is meant, not its letters.
    """

    text: str
    counted: bool
    special: bool


class Example(NamedTuple):
    """Segments in their order, and `where` they were read, for errors."""

    segments: tuple[Segment, ...]
    where: str


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


def completion_parse(tokenizer: Any) -> Parse:
    """`{"prompt", "completion"}` as the prompt, which begins as the tokenizer begins every text, and the completion
    with the end-of-text token, on which the loss is.

    >>> from types import SimpleNamespace
    >>> tokenizer = SimpleNamespace(eos_token="</s>", bos_token_id=None)
    >>> completion_parse(tokenizer).read({"prompt": "1+1=", "completion": "2"}, "line 1").segments[1:]
    (Segment(text='2', counted=True, special=False), Segment(text='</s>', counted=True, special=True))
    """
    first = tokenizer.bos_token if begins_texts(tokenizer) else ""

    def read(record: dict[str, Any], where: str) -> Example:
        prompt, completion = (string_field(record, name, where, ONE_FORMAT) for name in ("prompt", "completion"))
        if not completion:
            raise ValueError(f"{where}: field 'completion' is empty, so there is nothing to learn")
        parts = (
            Segment(first, False, True),
            Segment(prompt, False, False),
            Segment(completion, True, False),
            Segment(tokenizer.eos_token, True, True),
        )
        return Example(tuple(part for part in parts if part.text), where)

    return Parse(read, COMPLETION, "completion")


def begins_texts(tokenizer: Any) -> bool:
    """Whether a tokenizer puts its beginning-of-text token before a text by itself."""
    return tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer("")["input_ids"][:1]


def chat_parse(tokenizer: Any) -> Parse:
    """`{"messages"}` as the tokenizer's chat template renders them, the loss being on what the assistant says.

    A record's `tools`, where it has some, go to the template too.
    """
    template = tokenizer.chat_template

    def read(record: dict[str, Any], where: str) -> Example:
        messages = _messages(record, where)
        parts = turns(tokenizer, messages, record.get("tools"), where)
        return Example(tuple(_segments(parts, tokenizer)), where)

    return Parse(read, CHAT, ["chat", template])


def _segments(parts: list[tuple[str, bool]], tokenizer: Any) -> Iterator[Segment]:
    """Space behind the token that ends a turn is the template's, not the assistant's: it does not count."""
    for text, counted in parts:
        body = text.rstrip()
        if not counted or not any(body.endswith(token) for token in tokenizer.all_special_tokens):
            body = text
        yield from (Segment(part, own, True) for part, own in ((body, counted), (text[len(body) :], False)) if part)


def _messages(record: dict[str, Any], where: str) -> list[dict[str, Any]]:
    messages = record.get("messages")
    if messages is None:
        fields = ", ".join(map(repr, list(record)[:5])) or "none"
        raise ValueError(f"{where}: no field 'messages' (fields: {fields}); {ONE_FORMAT}")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: field 'messages' is no list of messages; expected {CHAT}")
    for number, message in enumerate(messages):
        role, content = (
            (message.get(name) for name in ("role", "content")) if isinstance(message, dict) else (None,) * 2
        )
        if not isinstance(role, str) or not (isinstance(content, str) or message.get("tool_calls")):
            raise ValueError(f"{where}: messages[{number}] has no string 'role' and 'content'; expected {CHAT}")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where}: no message has the role 'assistant', so there is nothing to learn")
    return _clean(messages)


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    return value
