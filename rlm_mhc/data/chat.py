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
MARK = "\ufeff"
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
REMEDY = (
    "give another by data.chat_template=FILE, best with the assistant's words in {% generation %} … {% endgeneration %}"
)


def with_template(tokenizer: Any, name: str | None) -> Any:
    """Return the tokenizer with the chat template of that name: `chatml`, a file of Jinja, or None: its own.

    A byte order mark that a template begins with is dropped: it would be a text before every conversation.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is not UTF-8; when the tokenizer has none, or several and no default one, and none is named.
    """
    if name is not None:
        tokenizer.chat_template = CHATML if name == "chatml" else _read_template(name)
    own = tokenizer.chat_template
    if own is None or (isinstance(own, dict) and "default" not in own):
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template to write conversations with; "
            "give one by data.chat_template=FILE (Jinja), or data.chat_template=chatml"
        )
    bare = {key: text.removeprefix(MARK) for key, text in own.items()} if isinstance(own, dict) else None
    tokenizer.chat_template = bare or own.removeprefix(MARK)
    return tokenizer


def _read_template(name: str) -> str:
    if not Path(name).is_file():
        raise FileNotFoundError(f"data.chat_template={name}: no such file; give a file of Jinja, or chatml")
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data.chat_template={name}: not UTF-8 text ({error}); save the file as UTF-8") from None


def turns(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    counted: list[bool],
    tools: Any,
    special: tuple[str, ...],
    where: str,
) -> tuple[list[tuple[str, bool]], bool]:
    """Cut the rendered conversation into `(text, whether the loss is on it)`, up to the last that counts.

    Generation tags in the template mark the assistant's text. Without them, the assistant's part of a message is what
    it adds to the rendering of the messages before that ends in a generation prompt.

    Args:
        tokenizer: with the chat template.
        messages: as the template takes them.
        counted: of each message, whether the loss is on it.
        tools: for the template.
        special: texts of the special tokens.
        where: the errors begin with it.

    Returns:
        The pieces; and whether the template ends the last turn itself, by a special token.

    Raises:
        ValueError: beginning with `where`, on messages that the template does not take.
        SetupError: when it cannot be used for this at all.
    """
    template = tokenizer.get_chat_template(tools=tools)
    marked = MARKED.search(template) is not None
    cut = _marked(tokenizer, template, messages, tools, where) if marked else _added(tokenizer, messages, tools, where)
    pieces, last = _counted(cut, messages, counted, where), 0
    for number, (text, counts) in enumerate(pieces):
        last = number if counts and text else last
    # Text after the last tag may hold the token that ends the turn.
    behind = "".join(text for text, _ in pieces[last + 1 :]).lstrip() if marked else ""
    return pieces[: last + 1], pieces[last][0].rstrip().endswith(special) or behind.startswith(special)


def _counted(
    cut: list[tuple[str, bool]], messages: list[dict[str, Any]], counted: list[bool], where: str
) -> list[tuple[str, bool]]:
    """Exclude the assistant's messages of weight 0 from the loss."""
    wanted = [counts for message, counts in zip(messages, counted, strict=True) if message["role"] == "assistant"]
    if all(wanted):
        return cut
    if len(wanted) != sum(says for _, says in cut):
        raise ValueError(
            f"{where}: some of the assistant's messages have weight 0, and the chat template does not have one pair of "
            "generation tags for each of them"
        )
    each = iter(wanted)
    return [(text, says and next(each)) for text, says in cut]


def _added(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, where: str) -> list[tuple[str, bool]]:
    """Cut by what each message adds to the rendering of those before."""

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
    return pieces


def _marked(
    tokenizer: Any, template: str, messages: list[dict[str, Any]], tools: Any, where: str
) -> list[tuple[str, bool]]:
    """Cut by the template's generation tags."""
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
    return [*pieces, (text[end:], False)]


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
