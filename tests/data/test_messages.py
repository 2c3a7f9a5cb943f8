"""Conversations as OpenAI's fine-tuning format has them, as chat templates take them."""

import json

import pytest

from rlm_mhc.data.messages import conversation, unused_keys

ASK, YES = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "yes"}


def read(*messages, **record):
    return conversation({"messages": list(messages), **record}, "a.jsonl, line 1", "")


@pytest.mark.parametrize(
    ("weight", "counted"), [({}, True), ({"weight": 1}, True), ({"weight": None}, True), ({"weight": 0}, False)]
)
def test_weights_say_which_of_the_assistants_messages_count(weight, counted):
    found = read({**ASK, "weight": 0}, {**YES, **weight}, ASK, YES)
    assert found.counted == [False, counted, False, True]
    assert found.messages == [ASK, YES, ASK, YES]
    for value, same in ((True, 1), (False, 0)):
        assert read({**YES, "weight": value}, YES).counted == read({**YES, "weight": same}, YES).counted


@pytest.mark.parametrize("weight", [0.5, -1, 2, "1", [], [1]])
def test_other_weights_are_refused(weight):
    with pytest.raises(ValueError, match=r"line 1: messages\[1\]\.weight is .*; expected 0 or 1"):
        read(ASK, {**YES, "weight": weight})


def test_weights_that_have_no_effect_are_refused():
    with pytest.raises(ValueError, match=r"messages\[0\]\.weight is 1; expected 0 or no weight"):
        read({**ASK, "weight": 1}, YES)
    with pytest.raises(ValueError, match=r"line 1: every message of the assistant has weight 0"):
        read(ASK, {**YES, "weight": 0})


def call(arguments):
    return {"id": "1", "type": "function", "function": {"name": "look", "arguments": arguments}}


@pytest.mark.parametrize(
    ("arguments", "parsed"),
    [('{"at": [1, "é"], "b": null}', {"at": [1, "é"], "b": None}), ({"at": 1}, {"at": 1}), ("", {}), ("{}", {})],
)
def test_arguments_of_a_tool_call_are_an_object(arguments, parsed):
    message = {"role": "assistant", "content": None, "tool_calls": [call(arguments)]}
    found = read(ASK, message)
    assert found.messages[1] == {"role": "assistant", "tool_calls": [call(parsed)]}
    bare = {"name": "look", "arguments": arguments}
    assert read(ASK, {**YES, "tool_calls": [bare]}).messages[1]["tool_calls"] == [{"name": "look", "arguments": parsed}]
    assert message["tool_calls"] == [call(arguments)]


@pytest.mark.parametrize("arguments", ["{", "[1]", "3", "null"])
def test_arguments_that_are_no_object_are_refused(arguments):
    with pytest.raises(
        ValueError, match=r"messages\[1\]\.tool_calls\[0\]: its arguments are .* expected a JSON object"
    ):
        read(ASK, {**YES, "tool_calls": [call(arguments)]})


@pytest.mark.parametrize("calls", ["x", {"function": 1}, ["x"], 3])
def test_tool_calls_that_are_no_list_are_refused(calls):
    with pytest.raises(ValueError, match=r"messages\[1\]\.tool_calls is no list of objects"):
        read(ASK, {**YES, "tool_calls": calls})


def test_text_parts_are_one_text():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert read({"role": "user", "content": parts}, YES).messages[0]["content"] == "one two"
    image = {"type": "image_url", "image_url": {"url": "x"}}
    for wrong in (image, "text", {"type": "text"}, {"text": "a"}):
        with pytest.raises(ValueError, match=r"messages\[0\]\.content has a part"):
            read({"role": "user", "content": [parts[0], wrong]}, YES)


def test_tools_are_a_list_of_objects_or_that_as_json():
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert read(ASK, YES, tools=tools).tools == read(ASK, YES, tools=json.dumps(tools)).tools == tools
    assert read(ASK, YES, tools=None).tools is read(ASK, YES).tools is None
    for wrong in ("x", "[1", {"a": 1}, [1], 3):
        with pytest.raises(ValueError, match="line 1: field 'tools' is"):
            read(ASK, YES, tools=wrong)


def test_keys_that_a_template_does_not_name_are_known():
    record = {
        "messages": [{**ASK, "name": "x", "mask": 1}, {**YES, "weight": 1, "reasoning": "so", "tool_calls": None}],
        "tools": [],
        "id": 3,
    }
    assert unused_keys(record, "{{ m['content'] }}") == {
        "id",
        "tools",
        "messages[].name",
        "messages[].mask",
        "messages[].reasoning",
    }
    template = "{{ m.name }}{{ tools }}{{ m['masked'] }}{{ m.reasoning_content }}"
    assert unused_keys(record, template) == {"id", "messages[].mask"}
