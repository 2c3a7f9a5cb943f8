"""A conversation as a tokenizer's chat template renders it, cut where the assistant begins and ends to speak."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlm_mhc.data.sources import SetupError
from rlm_mhc.validation import in_short

# Ends of text behind the assistant's turns: where the marks are no tokens of their own, generation stops there.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% if message['role'] == 'assistant' and eos_token != '<|im_end|>' %}{{ eos_token }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
REMEDY = (
    "give another by data.chat_template=FILE, best with the assistant's words in {% generation %} … {% endgeneration %}"
)


def with_template(tokenizer: Any, name: str | None) -> Any:
    """The tokenizer with the chat template of that name: `chatml`, a file of Jinja, or None: its own.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the tokenizer has none, or several and no default one, and none is named.
    """
    if name is not None and name != "chatml" and not Path(name).is_file():
        raise FileNotFoundError(f"data.chat_template={name}: no such file; give a file of Jinja, or chatml")
    if name is not None:
        tokenizer.chat_template = CHATML if name == "chatml" else Path(name).read_text(encoding="utf-8")
    own = tokenizer.chat_template
    if own is None or (isinstance(own, dict) and "default" not in own):
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template to write conversations with; "
            "give one by data.chat_template=FILE (Jinja), or data.chat_template=chatml"
        )
    return tokenizer


def turns(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, where: str) -> list[tuple[str, bool]]:
    """The conversation in pieces, up to the end of the last that counts: `(text, whether the assistant says it)`.

    A template with generation tags says itself what counts. Of any other, the assistant's part of a message is what
    it adds to the rendering of the messages before that ends in a generation prompt.

    Raises:
        ValueError: beginning with `where`, on messages that the template does not take.
        SetupError: when it cannot be used for this at all.
    """

    def render(count: int, prompt: bool) -> str:
        return _rendered(
            lambda: tokenizer.apply_chat_template(
                messages[:count], tools=tools, tokenize=False, add_generation_prompt=prompt
            ),
            where,
            tokenizer,
        )

    def opening(index: int) -> str:
        if index:
            return render(index, True)
        # Templates take no empty conversation, so the first turn's header is found by what announces a second.
        turn = render(1, False)
        header = render(1, True)[len(turn) :]
        before, found, _ = turn.partition(header) if header else ("", "", turn)
        if found != header:
            raise ValueError(f"{where}: the chat template does not tell where the first message's words begin")
        return before + header

    template = tokenizer.get_chat_template(tools=tools)
    if MARKED.search(template):
        return _marked(tokenizer, template, messages, tools, where)
    ends = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    texts = [text for i in ends for text in (opening(i), render(i + 1, False))]
    pieces, before = [], ""
    for number, text in enumerate([*texts, render(len(messages), False)]):
        if not text.startswith(before):
            raise SetupError(
                f"{where}: the chat template of {tokenizer.name_or_path} renders the start of a conversation "
                f"otherwise than the whole ({_difference(before, text)}), so that what the assistant says cannot be "
                f"told; {REMEDY}"
            )
        pieces.append((text[len(before) :], number % 2 == 1))
        before = text
    return pieces[:-1]


def _marked(
    tokenizer: Any, template: str, messages: list[dict[str, Any]], tools: Any, where: str
) -> list[tuple[str, bool]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    given = {"chat_template": template, "return_assistant_tokens_mask": True}
    (text,), (places,) = _rendered(
        lambda: render_jinja_template([messages], tools=tools, **given, **tokenizer.special_tokens_map),
        where,
        tokenizer,
    )
    if not any(stop > start for start, stop in places):
        raise ValueError(f"{where}: the chat template marks nothing of these messages as the assistant's")
    pieces, end = [], 0
    for start, stop in places:
        pieces += [(text[end:start], False), (text[start:stop], True)]
        end = stop
    return pieces


def _rendered(render: Callable[[], Any], where: str, tokenizer: Any) -> Any:
    try:
        return render()
    except Exception as error:
        # Templates raise what they like; what they are not is one of ours.
        said = in_short(error)
        if type(error).__name__ == "TemplateSyntaxError":
            raise SetupError(f"the chat template of {tokenizer.name_or_path} is not Jinja ({said}); {REMEDY}") from None
        raise ValueError(f"{where}: the chat template cannot render these messages ({said})") from None


def _difference(before: str, text: str) -> str:
    place = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), min(len(before), len(text)))
    return f"{before[place : place + 30]!r} becomes {text[place : place + 30]!r}"
