"""Validate chat messages, normalise them for chat templates, and mark which enter the loss."""

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

from rlm_mhc.data.sources import whole_characters

CHAT = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
# Synonyms: transformers copies one to the others.
ARGUMENTS = '{"key": "value"}'
REASONING = ("reasoning_content", "thinking", "reasoning")


class Conversation(NamedTuple):
    """Messages and tools as a chat template takes them; `counted`: of each message, whether the loss is on it."""

    messages: list[dict[str, Any]]
    counted: list[bool]
    tools: list[Any] | None


def conversation(record: dict[str, Any], where: str, remedy: str, *, objects: bool = True) -> Conversation:
    """Return the conversation in a record, as OpenAI's fine-tuning format has it, or as transformers takes it.

    A key that is null counts as missing. The text parts of a content become one text, and the arguments of a tool call
    an object or, without `objects`, a JSON string; see `takes_objects`.

    Raises:
        ValueError: beginning with `where`, when it holds none; `remedy` is for records without messages.
    """
    messages = record.get("messages")
    if messages is None:
        fields = ", ".join(map(repr, list(record)[:5])) or "none"
        raise ValueError(f"{where}: no field 'messages' (fields: {fields}); {remedy}")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: field 'messages' is no list of messages; expected {CHAT}")
    clean = [_message(message, f"{where}: messages[{number}]", objects) for number, message in enumerate(messages)]
    if not any(message["role"] == "assistant" for message, _ in clean):
        raise ValueError(f"{where}: no message has the role 'assistant', so there is nothing to learn")
    if not any(counted for _, counted in clean):
        raise ValueError(f"{where}: every message of the assistant has weight 0, so there is nothing to learn")
    return Conversation([message for message, _ in clean], [counted for _, counted in clean], _tools(record, where))


def takes_objects(tokenizer: Any) -> bool:
    """Return whether the chat template needs the arguments of tool calls as objects.

    A template that applies `tojson` to them would write a string in a string; one that joins texts needs the string.
    """
    call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": ARGUMENTS}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    try:
        return ARGUMENTS not in tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # templates raise what they like
        return True


def unused_keys(record: dict[str, Any], template: str) -> set[str]:
    """Return the keys of a record and of its messages that have no effect, since the template does not name them."""
    inner = {key for message in record["messages"] for key, value in message.items() if value is not None}
    unnamed = _unnamed(frozenset(inner - {"role", "content", "weight"}), template)
    outer = {key for key, value in record.items() if value is not None}
    return {*_unnamed(frozenset(outer - {"messages"}), template), *(f"messages[].{key}" for key in unnamed)}


@lru_cache(maxsize=1024)
def _unnamed(keys: frozenset[str], template: str) -> frozenset[str]:
    return frozenset(key for key in keys if not _mentions(template, REASONING if key in REASONING else [key]))


def _mentions(template: str, keys: Iterable[str]) -> bool:
    return any(re.search(rf"(?<!\w){re.escape(key)}(?!\w)", template) for key in keys)


def _message(message: Any, where: str, objects: bool) -> tuple[dict[str, Any], bool]:
    """Return a message as a template takes it, and whether the loss counts it."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"{where} has no string 'role' and 'content'; expected {CHAT}")
    fields = {key: _clean(value) for key, value in message.items() if value is not None}
    weight = fields.pop("weight", None)
    content = fields.get("content")
    if isinstance(content, list):
        fields["content"] = _joined(content, where)
    elif not isinstance(content, str) and not (content is None and fields.get("tool_calls")):
        raise ValueError(f"{where} has no string 'role' and 'content'; expected {CHAT}")
    if "tool_calls" in fields:
        fields["tool_calls"] = _tool_calls(fields["tool_calls"], where, objects)
    says = fields["role"] == "assistant"
    if weight is not None and (weight not in (0, 1) or (weight and not says)):
        allowed = "0 or 1" if says else "0 or no weight: only the assistant's messages enter the loss"
        raise ValueError(f"{where}.weight is {weight!r}; expected {allowed}")
    return fields, says and weight != 0


def _joined(parts: list[Any], where: str) -> str:
    """Join the text parts of a content, as transformers' server does."""
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f'{where}.content has a part {str(kind)[:60]!r}; expected {{"type": "text", "text": "…"}}')
    return " ".join(part["text"] for part in parts)


def _tool_calls(calls: Any, where: str, objects: bool) -> list[Any]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"{where}.tool_calls is no list of objects")
    return [_tool_call(call, f"{where}.tool_calls[{number}]", objects) for number, call in enumerate(calls)]


def _tool_call(call: dict[str, Any], where: str, objects: bool) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, dict) or function.get("arguments") is None:
        return call
    given = function["arguments"]
    if isinstance(given, str):
        wanted = _parsed(given, where) if objects else given
    else:
        wanted = given if objects else json.dumps(given, ensure_ascii=False)
    changed = {**function, "arguments": wanted}
    return {**call, "function": changed} if "function" in call else changed


def _parsed(arguments: str, where: str) -> dict[str, Any]:
    try:
        parsed = json.loads(arguments or "{}")
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise ValueError(f"{where}: its arguments are {arguments[:60]!r}; expected a JSON object")
    return _clean(parsed)


def _tools(record: dict[str, Any], where: str) -> list[Any] | None:
    tools = record.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError:
        raise ValueError(f"{where}: field 'tools' is not JSON; expected a list of objects") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"{where}: field 'tools' is no list of objects")
    return _clean(tools)


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    return value
