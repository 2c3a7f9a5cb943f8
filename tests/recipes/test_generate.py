"""Text from a checkpoint in the terminal."""

import io
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from rlm_mhc import ModelConfig, fn, load_pretrained, save_pretrained
from rlm_mhc.data import Source, load_tokenizer, train_tokenizer
from rlm_mhc.testing.models import perturbed, with_wide_vectors
from rlm_mhc.testing.tokenizers import tokenizer_with_gaps
from rlm_mhc.train.safe_stream import SafeStream, visible
from rlm_mhc.train.text import encode, sample_text, text_pieces
from rlm_mhc.tree import tree_map

WORDS = "Ünïcödé 数学 🙂🧮 grows; so does the list of words. "


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that has learnt nothing, and a tokenizer in which a character is one token or several."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = ModelConfig(hidden_dim=32, num_layers=1, num_heads=2, vocab_size=320, max_seq_len=64, mhc_flows=2)
    save_pretrained(folder, perturbed(fn.init(config), 0.3), config)
    documents = ["the list of words grows and the words of the list shrink " * 20]
    train_tokenizer(Source("test", "a", lambda bad: iter(documents)), 300).save_pretrained(folder)
    return folder


def run(recipe, checkpoint, *arguments):
    result = recipe("generate", f"checkpoint={checkpoint}", "device=cpu", *arguments)
    assert result.code == 0, result.err
    return result


def test_text_is_that_of_generate_and_the_same_for_the_same_seed(recipe, checkpoint):
    first = run(recipe, checkpoint, "prompt=the list", "max_new_tokens=20", "temperature=0")
    tokenizer = load_tokenizer(str(checkpoint), 320)
    params, config = load_pretrained(checkpoint)
    ids = encode(tokenizer, "the list")
    how = dict(stop_tokens=[tokenizer.eos_token_id], vocab_size=len(tokenizer))
    out = fn.generate(params, torch.tensor([ids]), config, max_new_tokens=20, **how)
    pieces = text_pieces(tokenizer, out.tokens[0, len(ids) :].tolist(), ids, how["stop_tokens"])
    assert first.out == "the list" + "".join(pieces) + "\n"
    how = ["prompt=the list", "max_new_tokens=20", "temperature=2", "top_k=100", "top_p=0.99", "min_p=0.001"]
    drawn = [run(recipe, checkpoint, *how, f"seed={seed}").out for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_weights_of_several_dtypes_are_no_hindrance(recipe, checkpoint, tmp_path):
    params, config = load_pretrained(checkpoint)
    half = fn.cast(params, config, torch.bfloat16)
    wide = tree_map(torch.Tensor.float, half.embed_tokens)
    texts = []
    trees = {"half": half, "wide norms": with_wide_vectors(half), "wide embedding": half._replace(embed_tokens=wide)}
    for name, tree in trees.items():
        shutil.copytree(checkpoint, tmp_path / name)
        save_pretrained(tmp_path / name, tree, config)
        texts.append(run(recipe, tmp_path / name, "prompt=the list", "max_new_tokens=8", "temperature=0").out)
    assert texts[0] == texts[1] == texts[2] != "the list\n"


def test_generation_ends_where_the_checkpoint_says(recipe, checkpoint, tmp_path):
    greedy = ["prompt=the list", "temperature=0", "max_new_tokens=12"]
    tokenizer = load_tokenizer(str(checkpoint), 320)
    params, config = load_pretrained(checkpoint)
    ids = encode(tokenizer, "the list")
    new = (
        fn.generate(params, torch.tensor([ids]), config, max_new_tokens=12, vocab_size=300)
        .tokens[0, len(ids) :]
        .tolist()
    )
    shutil.copytree(checkpoint, tmp_path / "own")
    for found in (new[5], [299, new[5]]):
        (tmp_path / "own" / "generation_config.json").write_text(json.dumps({"eos_token_id": found}))
        result = run(recipe, tmp_path / "own", *greedy)
        assert result.out == "the list" + "".join(text_pieces(tokenizer, new, ids, [new[5]])) + "\n"
        assert f", {new.index(new[5])} decoded at" in result.err
    # Without it, as transformers does: where config.json says.
    (tmp_path / "own" / "generation_config.json").unlink()
    for found in (new[5], [299, new[5]]):
        config_file = tmp_path / "own" / "config.json"
        config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"eos_token_id": found}))
        result = run(recipe, tmp_path / "own", *greedy)
        assert result.out == "the list" + "".join(text_pieces(tokenizer, new, ids, [new[5]])) + "\n"
    (tmp_path / "own" / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    result = recipe("generate", f"checkpoint={tmp_path / 'own'}", "device=cpu")
    assert (result.code, "eos_token_id='</s>': expected the id" in result.last_error) == (2, True)


def test_a_tokenizer_whose_ids_have_gaps_draws_and_ends_at_the_last_of_them(recipe, checkpoint, tmp_path):
    gaps = tokenizer_with_gaps(load_tokenizer(str(checkpoint), 320), 319)
    greedy = ["prompt=the list", "temperature=0", "max_new_tokens=12"]
    params, config = load_pretrained(checkpoint)
    embedding = torch.zeros_like(params.embed_tokens.weight)
    ids = encode(gaps, "the list")
    embedding[ids] = params.embed_tokens.weight[ids]
    params = params._replace(embed_tokens=params.embed_tokens._replace(weight=embedding))
    state = fn.collapse_streams(fn.backbone(params, torch.tensor([ids]), config).hidden.x)[0, -1]
    embedding[319] = state * 9  # the embedding is the head
    save_pretrained(tmp_path / "gaps", params, config)
    gaps.save_pretrained(tmp_path / "gaps")
    result = run(recipe, tmp_path / "gaps", *greedy)
    assert (result.out, "nothing decoded" in result.err) == ("the list\n", True)


@pytest.mark.parametrize(
    "prompt",
    [
        "Hello, world",
        "It's late",
        'say "hi',
        "key: {a}",
        "f(x) = [1",
        "2024",
        "${x}",
        "a=b",
        "null",
        " x ",
        "\\",
        "#",
        "",
    ],
)
def test_any_sentence_is_a_prompt_as_it_stands(recipe, checkpoint, prompt):
    result = run(recipe, checkpoint, f"prompt={prompt}", "max_new_tokens=1", "temperature=0")
    assert result.out.startswith(prompt)


@pytest.mark.parametrize("terminal", [True, False])
def test_control_characters_are_escaped_on_a_terminal_and_raw_elsewhere(recipe, checkpoint, monkeypatch, terminal):
    monkeypatch.setattr(SafeStream, "isatty", lambda outlet: terminal)
    prompt = "the\tlist\x1b]0;title\x07\x9b2J"
    result = run(recipe, checkpoint, f"prompt={prompt}", "max_new_tokens=20", "temperature=2", "seed=3")
    assert result.out.startswith("the\tlist\\x1b]0;title\\x07\\x9b2J" if terminal else prompt)
    assert (visible(result.out) == result.out) == terminal


def test_speed_of_prompt_and_decoding_is_told_apart_on_stderr(recipe, checkpoint):
    result = run(recipe, checkpoint, "prompt=the list", "max_new_tokens=4", "temperature=0")
    assert re.search(r"prompt of \d+ tokens at [\d.,]+ tokens/s, \d+ decoded at [\d.,]+ tokens/s", result.err)
    assert "tokens/s" not in result.out


def test_prompts_of_a_file_are_gone_on_with_one_after_the_other(recipe, checkpoint, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("the words\nof the list\n")
    result = run(recipe, checkpoint, f"prompt_file={file}", "max_new_tokens=3", "repetition_penalty=1.3")
    assert result.out.index("the words") < result.out.index("of the list")
    assert result.err.count("tokens/s") >= 2


def test_a_line_of_a_prompt_file_ends_at_a_newline_alone(recipe, checkpoint, tmp_path):
    lines = ["the\u2028list", "of\x85words", "and\x0cthe\x0blist\x1c", "a\rword"]
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\n")
    result = run(recipe, checkpoint, f"prompt_file={tmp_path / 'prompts.txt'}", "max_new_tokens=1", "temperature=0")
    assert result.err.count("prompt of") == len(lines)
    assert result.out.startswith(lines[0])
    assert all(line in result.out for line in lines)
    (tmp_path / "prompts.txt").write_bytes(b"the list\nof w\xf6rds\n")
    result = recipe("generate", f"checkpoint={checkpoint}", f"prompt_file={tmp_path / 'prompts.txt'}", "device=cpu")
    assert result.code == 2
    assert "prompts.txt: not UTF-8 at byte 13 (invalid start byte); save it as UTF-8" in result.last_error


def test_prompts_of_standard_input_are_read_alike(recipe, checkpoint, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfthe\x0clist\n")))
    result = run(recipe, checkpoint, "prompt_file=-", "max_new_tokens=1", "temperature=0")
    assert result.out.startswith("the\x0clist")
    assert result.err.count("prompt of") == 1
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"w\xf6rds")))
    result = recipe("generate", f"checkpoint={checkpoint}", "prompt_file=-", "device=cpu")
    assert (result.code, "prompt_file=-: not UTF-8 at byte 1" in result.last_error) == (2, True)


@pytest.mark.slow
@pytest.mark.usefixtures("no_shape_checks")
def test_compiled_text_is_the_same(recipe, checkpoint):
    how = ["prompt=the list", "max_new_tokens=12", "temperature=0"]
    assert run(recipe, checkpoint, *how, "compile=true").out == run(recipe, checkpoint, *how).out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint=/nowhere"], "/nowhere: no such checkpoint folder"),
        (["checkpoint=''"], "checkpoint: give a folder"),
        (["max_new_tokens=64"], "max_seq_len=64; at most 63 fit"),
        (["top_p=2"], "top_p=2"),
        (["temprature=1"], "did you mean 'temperature'"),
        (["prompt=a", "prompt_file=b"], "give either"),
        (["prompt_file=/nowhere.txt"], "/nowhere.txt: No such file"),
    ],
)
def test_a_mistake_is_one_line(recipe, checkpoint, arguments, message):
    result = recipe("generate", f"checkpoint={checkpoint}", "device=cpu", *arguments)
    assert result.code == 2
    assert message in result.last_error


def test_characters_of_several_tokens_come_whole(checkpoint):
    tokenizer = load_tokenizer(str(checkpoint), 320)
    ids = encode(tokenizer, WORDS)
    assert any("\ufffd" in tokenizer.decode([token]) for token in ids)
    for cut in range(len(ids)):
        before = tokenizer.decode(ids[:cut])
        if not before.endswith("\ufffd"):
            pieces = list(text_pieces(tokenizer, ids[cut:], ids[:cut], [0]))
            assert before + "".join(pieces) == WORDS
            assert not any("\ufffd" in piece for piece in pieces)
    # A text that ends within a character ends in the sign for that.
    assert "".join(text_pieces(tokenizer, ids[:1], [], [0])) == "\ufffd"
    ended = [*encode(tokenizer, "list"), tokenizer.eos_token_id, *encode(tokenizer, "words")]
    assert "".join(text_pieces(tokenizer, ended, [], [tokenizer.eos_token_id])) == "list"


def test_sampled_text_stays_within_the_models_positions(checkpoint):
    tokenizer = load_tokenizer(str(checkpoint), 320)
    params, config = load_pretrained(checkpoint)
    text = sample_text(params, config, tokenizer, "the list", tokens=500)
    assert text.startswith("the list")
    assert text == sample_text(params, config, tokenizer, "the list", tokens=500)
    assert sample_text(params, config, tokenizer, WORDS * 4) == WORDS * 4
    assert sample_text(params, config, tokenizer, "the list", stop_token_ids=range(1, 300)) == "the list"


def test_a_checkpoints_tokenizer_is_loaded_without_a_question(checkpoint, capfd):
    load = f"load_tokenizer({str(checkpoint)!r}, 320)"
    code = f"from rlm_mhc.data import load_tokenizer; print('trust_remote_code' in {load}.init_kwargs)"
    subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, check=True, timeout=100)
    assert capfd.readouterr().out == "False\n"
