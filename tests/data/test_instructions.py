"""Prompts, completions and chats: what counts is exact to the token."""

import json

import numpy as np
import pytest

from rlm_mhc.data import (
    BadLines,
    Position,
    Source,
    chat_parse,
    completion_parse,
    eval_batches,
    find_format,
    next_batch,
    prepare_examples,
    record_source,
    train_tokenizer,
    with_template,
)
from rlm_mhc.testing.tokenizers import llama_tokenizer, tokenizer_with_gaps

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is a row?"},
    {"role": "assistant", "content": "a line of a matrix"},
    {"role": "user", "content": "and a column?"},
    {"role": "assistant", "content": "one across  "},
]


def words(bad):
    return iter(["row column matrix stream what is a line of brief user assistant"] * 3)


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(Source("words", "w", words), 290)


@pytest.fixture
def tokenizer(trained, tmp_path):
    """One of its own for each test, with the marks of ChatML as tokens."""
    trained.save_pretrained(tmp_path / "tokenizer")
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return own


def written(folder, records):
    file, content = folder / "data.jsonl", "".join(json.dumps(record) + "\n" for record in records)
    if not file.is_file() or file.read_text() != content:
        file.write_text(content)
    return str(file)


def prepared(folder, records, parse, tokenizer, length=64, **options):
    source = record_source(written(folder, records), parse)
    said = options.pop("said", [])
    return prepare_examples(
        folder / "tokens", source, None, tokenizer=tokenizer, max_length=length, say=said.append, **options
    )


def counted_texts(rows, tokenizer):
    """Of each example, the runs of tokens that count, decoded."""
    texts = []
    for index in range(rows.total):
        inputs, targets = rows.inputs_and_targets(index)
        assert inputs.shape == targets.shape == (rows.length,)
        runs = np.split(targets, np.flatnonzero(np.diff(targets == -100)) + 1)
        texts.append([tokenizer.decode(run.tolist()) for run in runs if run[0] != -100])
        *known, _ = np.flatnonzero(targets != -100)
        assert (targets[known] == inputs[np.array(known, int) + 1]).all()  # a target is the next input
    return texts


def test_completions_count_to_the_token_and_end_with_end_of_text(tmp_path, tokenizer):
    # "rowcolumn" would be merged across the boundary, were it tokenized as one text.
    records = [{"prompt": f"what is a row{i}", "completion": f"a line{i} <|endoftext|> 汉"} for i in range(3)]
    data = prepared(tmp_path, records, completion_parse(), tokenizer)
    assert (data.train.total, data.evaluation.total) == (2, 1)
    every = counted_texts(data.train, tokenizer) + counted_texts(data.evaluation, tokenizer)
    assert every == [[f"a line{i} <|endoftext|> 汉<|endoftext|>"] for i in range(3)]
    _, targets = data.train.inputs_and_targets(0)
    assert (targets == tokenizer.eos_token_id).sum() == 1  # what spells the token is letters
    inputs, _ = data.train.inputs_and_targets(0)
    assert tokenizer.decode(inputs[inputs != 0].tolist()).startswith("what is a row0a line0")


@pytest.mark.parametrize("template", [MARKED, PLAIN, "chatml"])
def test_chats_count_what_the_assistant_says(tmp_path, tokenizer, template):
    if template != "chatml":
        (tmp_path / "chat.jinja").write_text(template)
    named = with_template(tokenizer, "chatml" if template == "chatml" else str(tmp_path / "chat.jinja"))
    data = prepared(tmp_path, [{"messages": CHAT}], chat_parse(named), named, length=128)
    end = "<|im_end|><|endoftext|>" if template == "chatml" else "<|im_end|>"
    assert counted_texts(data.train, tokenizer) == [[f"a line of a matrix{end}", f"one across  {end}"]]
    inputs, targets = data.train.inputs_and_targets(0)
    whole = named.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    used = int(np.flatnonzero(targets != -100)[-1]) + 1
    if template != "chatml":  # all as the template renders it, but the line break behind the last turn
        assert [*inputs[:used], targets[used - 1]] == whole[:-1]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in targets


def test_marks_of_generation_agree_with_transformers_own_mask(tmp_path, tokenizer):
    tokenizer.chat_template = MARKED
    data = prepared(tmp_path, [{"messages": CHAT}], chat_parse(tokenizer), tokenizer, length=128)
    options = dict(tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    theirs = tokenizer.apply_chat_template(CHAT, **options)
    inputs, targets = data.train.inputs_and_targets(0)
    ids, mask = np.array(theirs["input_ids"]), np.array(theirs["assistant_masks"], dtype=bool)
    assert (inputs[: len(ids) - 2] == ids[:-2]).all()
    assert (targets[: len(ids) - 1] == np.where(mask, ids, -100)[1:]).all()


def test_a_template_that_rewrites_the_past_is_refused_by_name(tmp_path, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% if loop.last %}!{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match=r"line 1: the chat template of .*tokenizer.*data\.chat_template=FILE"):
        prepared(tmp_path, [{"messages": CHAT}], chat_parse(tokenizer), tokenizer, max_bad_fraction=1.0)


def test_templates_that_are_missing_or_broken_are_errors_with_a_remedy(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"no chat template.*data\.chat_template=chatml"):
        with_template(tokenizer, None)
    with pytest.raises(FileNotFoundError, match=r"data\.chat_template=nope"):
        with_template(tokenizer, "nope")
    tokenizer.chat_template = "{% for %}"
    with pytest.raises(ValueError, match="is not Jinja"):
        prepared(tmp_path, [{"messages": CHAT}], chat_parse(tokenizer), tokenizer)
    tokenizer.chat_template = MARKED.replace("assistant", "model")
    with pytest.raises(ValueError, match="marks nothing"):
        prepared(tmp_path, [{"messages": CHAT}], chat_parse(tokenizer), tokenizer, strict=True)


COMPLETIONS = {
    '{"prompt": 1, "completion": "a"}': "field 'prompt' is not a string but int",
    '{"prompt": "a", "completion": ["b"]}': "field 'completion' is not a string but list",
    '{"prompt": "a"}': "no field 'completion'",
    '{"prompt": "a", "completion": ""}': "nothing to learn",
    '{"text": "a"}': "one format",
    "nonsense": 'not JSON.*"completion"',
}
CHATS = {
    '{"messages": []}': "no list of messages",
    '{"messages": "a"}': "no list of messages",
    '{"messages": ["a"]}': r"messages\[0\] has no string 'role'",
    '{"messages": [{"role": "user"}]}': r"messages\[0\] has no string",
    '{"messages": [{"role": "user", "content": 1}]}': r"messages\[0\] has no string",
    '{"messages": [{"role": "user", "content": "a"}]}': "no message has the role 'assistant'",
    '{"text": "a"}': "no field 'messages'",
}


@pytest.mark.parametrize(("kind", "line"), [("completion", x) for x in COMPLETIONS] + [("chat", x) for x in CHATS])
def test_nonsense_is_named_with_file_and_line(tmp_path, tokenizer, kind, line):
    tokenizer.chat_template = PLAIN
    good = json.dumps({"prompt": "a", "completion": "b", "messages": CHAT})
    (tmp_path / "bad.jsonl").write_text(f"{good}\n{line}\n")
    parse = chat_parse(tokenizer) if kind == "chat" else completion_parse()
    source = record_source(str(tmp_path / "bad.jsonl"), parse)
    bad = BadLines(strict=False, max_fraction=1.0)
    assert len(list(source.read(bad))) == 1
    assert (bad.lines, bad.bad) == (2, 1)
    with pytest.raises(
        ValueError, match=rf"bad\.jsonl, line 2: .*{(COMPLETIONS if kind == 'completion' else CHATS)[line]}"
    ):
        list(source.read(BadLines()))


def test_long_examples_are_cut_and_bad_where_nothing_counts_any_more(tmp_path, tokenizer):
    records = [{"prompt": "zz" * n, "completion": "y" * 9} for n in (1, 3, 5)]
    said = []
    parse = completion_parse()
    data = prepared(tmp_path, records, parse, tokenizer, length=8, max_bad_fraction=0.5, said=said)
    assert data.bad_fraction == pytest.approx(1 / 3)
    assert counted_texts(data.train, tokenizer) == [["y" * 7]]
    assert counted_texts(data.evaluation, tokenizer) == [["y" * 3]]
    assert said[0].startswith(f"bad line     {tmp_path / 'data.jsonl'}, line 3: none of the first 8")
    assert "cut          2 examples at data.max_length=8 tokens" in said
    again = []
    assert prepared(tmp_path, records, parse, tokenizer, length=8, max_bad_fraction=0.5, said=again)[3] == data[3]
    assert any("reused" in line for line in again)
    assert prepared(tmp_path, records, parse, tokenizer, length=9, max_bad_fraction=0.5).fingerprint != data.fingerprint
    with pytest.raises(ValueError, match="line 3"):
        prepared(tmp_path, records, parse, tokenizer, length=8, strict=True)


def test_every_hundredth_example_is_held_out(tmp_path, tokenizer):
    records = [{"prompt": "a", "completion": f"{i}"} for i in range(250)]
    data = prepared(tmp_path, records, completion_parse(), tokenizer)
    held_out = counted_texts(data.evaluation, tokenizer)
    assert held_out == [["99<|endoftext|>"], ["199<|endoftext|>"]]
    assert data.train.total == 248
    one = prepared(tmp_path, records[:1], completion_parse(), tokenizer)
    assert (one.train.total, one.evaluation.total) == (1, 0)


def test_the_loader_draws_each_example_once_and_evaluates_on_the_same(tmp_path, tokenizer):
    data = prepared(
        tmp_path, [{"prompt": "a", "completion": f"{i:03}"} for i in range(20)], completion_parse(), tokenizer
    )
    batch, position = next_batch(data.train, Position(0), data.train.total)
    assert position == Position(0, 1, 0)
    assert len({tuple(row) for row in batch.targets.tolist()}) == data.train.total
    first, again = (list(eval_batches(data.evaluation, 2, 4)) for _ in range(2))
    assert all(bool((a.targets == b.targets).all()) for a, b in zip(first, again, strict=True))


def used_tokens(rows, tokenizer):
    """The tokens of the first example."""
    inputs, targets = rows.inputs_and_targets(0)
    last = int(np.flatnonzero(targets != -100)[-1])
    return tokenizer.convert_ids_to_tokens([*inputs[: last + 1].tolist(), int(targets[last])])


def test_a_beginning_of_text_that_the_tokenizer_writes_is_written(tmp_path):
    tokenizer = llama_tokenizer(["a b 2"] * 9)
    data = prepared(tmp_path, [{"prompt": "a=", "completion": "2"}], completion_parse(), tokenizer)
    whole = [*tokenizer("a=2")["input_ids"], tokenizer.eos_token_id]
    assert used_tokens(data.train, tokenizer) == tokenizer.convert_ids_to_tokens(whole)
    assert counted_texts(data.train, tokenizer) == [["2</s>"]]


def test_one_that_the_tokenizer_does_not_write_is_not(tmp_path, tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    data = prepared(tmp_path, [{"prompt": "a", "completion": "b"}], completion_parse(), tokenizer)
    assert used_tokens(data.train, tokenizer) == ["a", "b", "<|endoftext|>"]


INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '\n[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_chat_has_the_tokens_of_its_whole_text(tmp_path, legacy):
    tokenizer = llama_tokenizer(["[INST] what is a row [/INST]", "\n\n"] * 9, legacy=legacy)
    tokenizer.chat_template = INST
    data = prepared(tmp_path, [{"messages": CHAT[1:]}], chat_parse(tokenizer), tokenizer, length=256)
    whole = tokenizer.apply_chat_template(CHAT[1:], tokenize=True, return_dict=False)
    used = used_tokens(data.train, tokenizer)
    assert (used, used[-1]) == (tokenizer.convert_ids_to_tokens(whole)[: len(used)], "</s>")
    assert any("\n\n" in token for token in used)
    assert [len(texts) for texts in counted_texts(data.train, tokenizer)] == [2]


@pytest.mark.parametrize(
    "template", [MARKED, PLAIN, "{{ bos_token }}{{ '<|im_start|>system\nx<|im_end|>\n' }}" + PLAIN]
)
def test_the_assistant_may_speak_first(tmp_path, tokenizer, template):
    tokenizer.chat_template = template
    data = prepared(tmp_path, [{"messages": CHAT[2:]}], chat_parse(tokenizer), tokenizer, length=128)
    said = [f"{message['content']}<|im_end|>" for message in CHAT[2:] if message["role"] == "assistant"]
    assert counted_texts(data.train, tokenizer) == [said]


def test_a_template_that_hides_where_the_first_message_begins_is_told_of(tmp_path, tokenizer):
    tokenizer.chat_template = PLAIN.replace("{{ '<|im_start|>assistant\\n' }}", "{{ '>>' }}")
    with pytest.raises(ValueError, match=r"line 1: the chat template does not tell where the first message"):
        prepared(tmp_path, [{"messages": CHAT[2:3]}], chat_parse(tokenizer), tokenizer, strict=True)


def test_of_several_templates_the_default_one_renders(tmp_path, tokenizer):
    tokenizer.chat_template = {"default": PLAIN, "tool_use": "{{ 'tools' }}" + PLAIN}
    named = with_template(tokenizer, None)
    parse = chat_parse(named)
    plain, tools = (parse.read({"messages": CHAT, **more}, "").spans[0].text for more in ({}, {"tools": [{}]}))
    assert (plain.startswith("<|im_start|>system"), tools.startswith("tools<|im_start|>system")) == (True, True)
    tokenizer.chat_template = {"rag": PLAIN}
    with pytest.raises(ValueError, match="no chat template"):
        with_template(tokenizer, None)


@pytest.mark.parametrize("template", [MARKED, PLAIN])
@pytest.mark.parametrize("mark", ["<|im_end|>", "<|eot|>"])
def test_the_special_tokens_that_end_turns_are_known(tmp_path, tokenizer, template, mark):
    tokenizer.add_tokens(["<|eot|>"], special_tokens=True)  # one that transformers has no name for
    tokenizer.chat_template = template.replace("<|im_end|>", mark)
    data = prepared(tmp_path, [{"messages": CHAT}], chat_parse(tokenizer), tokenizer, length=128)
    assert data.stop_token_ids == (tokenizer.convert_tokens_to_ids(mark),)
    assert counted_texts(data.train, tokenizer) == [[f"a line of a matrix{mark}", f"one across  {mark}"]]
    data = prepared(tmp_path, [{"prompt": "a", "completion": "b"}], completion_parse(), tokenizer)
    assert data.stop_token_ids == (tokenizer.eos_token_id,)


def test_a_special_token_at_the_cut_of_an_example_ends_no_turn(tmp_path, tokenizer):
    tokenizer.chat_template = PLAIN
    chat = [CHAT[1], {"role": "assistant", "content": "a<|im_start|>b"}]
    parse = chat_parse(tokenizer)
    tokens = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    cut = max(i for i, token in enumerate(tokens) if token == tokenizer.convert_tokens_to_ids("<|im_start|>"))
    for length, ends in ((cut, ()), (128, (tokenizer.convert_tokens_to_ids("<|im_end|>"),))):
        assert prepared(tmp_path, [{"messages": chat}], parse, tokenizer, length=length).stop_token_ids == ends


OPEN = "{% for m in messages %}{{ '\\n' + m['role'] + ': ' + m['content'] }}{% endfor %}"
OPEN += "{% if add_generation_prompt %}{{ '\\nassistant: ' }}{% endif %}"
TAGGED = "{% for m in messages %}{{ '\\n' + m['role'] + ': ' }}"
TAGGED += "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
TAGGED += "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"


@pytest.mark.parametrize("template", [OPEN, TAGGED])
@pytest.mark.parametrize("behind", [[], [{"role": "user", "content": "thanks"}]])
def test_turns_that_a_template_leaves_open_end_with_end_of_text(tmp_path, tokenizer, template, behind):
    tokenizer.chat_template = template
    said, records = [], [{"messages": CHAT + behind}] * 2
    parse = chat_parse(tokenizer)
    data = prepared(tmp_path, records, parse, tokenizer, length=128, said=said)
    assert counted_texts(data.train, tokenizer) == [["a line of a matrix", "one across  <|endoftext|>"]]
    assert data.stop_token_ids == (tokenizer.eos_token_id,)
    prepared(tmp_path, records, parse, tokenizer, length=128, said=said)
    assert sum(line.startswith("end of text  is appended to 2 examples") for line in said) == 2


def test_a_turn_that_is_closed_has_one_end(tmp_path, tokenizer):
    tokenizer.chat_template, said = PLAIN, []
    prepared(tmp_path, [{"messages": CHAT}], chat_parse(tokenizer), tokenizer, length=128, said=said)
    assert not [line for line in said if line.startswith(("end of text", "warning"))]


def test_an_end_that_generation_tags_leave_out_is_left_out_and_told_of(tmp_path, tokenizer):
    tokenizer.chat_template = TAGGED.replace("{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    said = []
    data = prepared(tmp_path, [{"messages": CHAT}], chat_parse(tokenizer), tokenizer, length=128, said=said)
    assert counted_texts(data.train, tokenizer) == [["a line of a matrix", "one across  "]]
    assert [line for line in said if "generation will not stop by itself" in line]


@pytest.mark.parametrize("template", [MARKED, PLAIN, TAGGED])
@pytest.mark.parametrize(("weights", "wanted"), [((0, 1), [1]), ((1, 0), [0]), ((1, 1), [0, 1])])
def test_messages_of_weight_zero_are_read_and_not_counted(tmp_path, tokenizer, template, weights, wanted):
    tokenizer.chat_template = template
    chat, each = [dict(message) for message in CHAT], iter(weights)
    for message in chat:
        if message["role"] == "assistant":
            message["weight"] = next(each)
    data = prepared(tmp_path, [{"messages": chat}], chat_parse(tokenizer), tokenizer, length=128)
    end = "<|im_end|>" if template != TAGGED else ""
    texts = [f"{text}{end}" for text in ("a line of a matrix", "one across  ")]
    expected = [texts[i] for i in wanted]
    if template == TAGGED:
        expected[-1] += "<|endoftext|>"
    assert counted_texts(data.train, tokenizer) == [expected]
    assert "a line of a matrix" in tokenizer.decode(data.train.inputs_and_targets(0)[0])


def test_weights_need_a_tag_for_each_message(tmp_path, tokenizer):
    twice = "{% generation %}{{ m['content'] }}{% endgeneration %}"
    tokenizer.chat_template = TAGGED.replace(twice, twice * 2)
    chat = [{"role": "assistant", "content": "a", "weight": 0}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match=r"line 1: some of the assistant's messages have weight 0"):
        prepared(tmp_path, [{"messages": chat}], chat_parse(tokenizer), tokenizer, strict=True)


TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['content'] %}{{ m['content'] }}{% endif %}"
    "{% for call in m['tool_calls'] or [] %}{{ call.function.name + call.function.arguments | tojson }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize("arguments", ['{"n": "é"}', {"n": "é"}])
@pytest.mark.parametrize("tagged", [False, True])
def test_tool_calls_are_rendered_as_objects(tmp_path, tokenizer, arguments, tagged):
    tokenizer.chat_template = TOOLS
    if tagged:
        start = "{% if m['role'] == 'assistant' %}{% generation %}"
        tokenizer.chat_template = TOOLS.replace("{% if m['content'] %}", start + "{% if m['content'] %}").replace(
            "{{ '<|im_end|>\\n' }}",
            "{{ '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}",
        )
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    chat = [CHAT[1], {"role": "assistant", "content": None, "tool_calls": [call]}]
    record = {"messages": chat, "tools": [{"type": "function", "function": {"name": "look"}}]}
    data = prepared(tmp_path, [record], chat_parse(tokenizer), tokenizer, length=256)
    assert counted_texts(data.train, tokenizer) == [['look{"n": "é"}<|im_end|>']]
    assert tokenizer.decode(data.train.inputs_and_targets(0)[0]).startswith('[{"type": "function"')


@pytest.mark.parametrize("arguments", ['{"n": "é"}', {"n": "é"}])
def test_a_template_that_joins_texts_gets_the_arguments_as_a_string(tmp_path, tokenizer, arguments):
    tokenizer.chat_template = TOOLS.replace("call.function.arguments | tojson", "call.function.arguments")
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    chat = [CHAT[1], {"role": "assistant", "content": None, "tool_calls": [call]}]
    data = prepared(tmp_path, [{"messages": chat}], chat_parse(tokenizer), tokenizer, length=256, strict=True)
    assert counted_texts(data.train, tokenizer) == [['look{"n": "é"}<|im_end|>']]


def test_keys_without_effect_are_named_once_also_of_reused_tokens(tmp_path, tokenizer):
    tokenizer.chat_template = PLAIN
    records = [{"messages": [{**message, "loss": 1} for message in CHAT], "id": i} for i in range(3)]
    for _ in range(2):
        said = []
        prepared(tmp_path, records, chat_parse(tokenizer), tokenizer, length=128, said=said)
        assert [line for line in said if "chat template does not name" in line] == [
            "no effect    of the keys 'id', 'messages[].loss': the chat template does not name them"
        ]


@pytest.mark.parametrize("where", ["file", "tokenizer", "default"])
def test_a_byte_order_mark_of_a_template_is_no_text(tmp_path, tokenizer, where):
    (tmp_path / "chat.jinja").write_text("\ufeff" + PLAIN, encoding="utf-8")
    if where != "file":
        tokenizer.chat_template = "\ufeff" + PLAIN if where == "tokenizer" else {"default": "\ufeff" + PLAIN}
    named = with_template(tokenizer, str(tmp_path / "chat.jinja") if where == "file" else None)
    (text, _), *_ = chat_parse(named).read({"messages": CHAT}, "").spans
    assert text.startswith("<|im_start|>system")


def test_a_template_that_is_no_utf8_is_named(tmp_path, tokenizer):
    (tmp_path / "chat.jinja").write_bytes(b"\xff\xfe" + PLAIN.encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"data\.chat_template=.*chat\.jinja: not UTF-8 text"):
        with_template(tokenizer, str(tmp_path / "chat.jinja"))


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_examples_of_a_tokenizer_with_gaps_have_its_ids(tmp_path, trained, kind):
    gaps = tokenizer_with_gaps(trained, 70000)
    gaps.chat_template = OPEN
    parse = chat_parse(gaps) if kind == "chat" else completion_parse()
    data = prepared(tmp_path, [{"prompt": "a", "completion": "b", "messages": CHAT[1:3]}], parse, gaps)
    assert data.train.inputs_and_targets(0)[1].max() == 70000
    assert counted_texts(data.train, gaps)[0][0].endswith("<|endoftext|>")


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ({"text": "a"}, "text"),
        ({"prompt": "a", "completion": "b"}, "completion"),
        ({"messages": CHAT, "text": "a"}, "chat"),
        ({"prompt": "a", "completion": "b", "text": "ab"}, "completion"),
    ],
)
def test_the_format_is_that_of_the_first_good_line(tmp_path, line, kind):
    (tmp_path / "a.jsonl").write_text("nonsense\n" + '{"id": 1}\n' + json.dumps(line) + "\n")
    assert find_format(str(tmp_path / "a.jsonl"), "text") == kind


def test_a_file_of_no_format_says_what_was_expected(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: no field 'text'.*prompt.*messages"):
        find_format(str(tmp_path / "a.jsonl"), "text")
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no line"):
        find_format(str(tmp_path / "a.jsonl"), "text")
