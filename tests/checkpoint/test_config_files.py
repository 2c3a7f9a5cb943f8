"""What a checkpoint says of generation."""

import json

import pytest

from rlm_mhc.checkpoint.config_files import load_generation_config, stop_tokens, write_generation_config
from rlm_mhc.data import Source, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(Source("words", "w", lambda bad: iter(["row column"] * 9)), 270)


@pytest.mark.parametrize(
    ("base", "stop_token_ids", "ends"),
    [
        (None, (), 0),
        ({"eos_token_id": 0}, (0,), 0),
        ({"eos_token_id": None}, (5,), [0, 5]),
        ({"eos_token_id": [7, 0]}, (5, 7), [7, 0, 5]),
    ],
)
def test_more_ends_of_generation_join_those_of_the_base(tmp_path, tokenizer, base, stop_token_ids, ends):
    write_generation_config(tmp_path, tokenizer, base, stop_token_ids)
    assert load_generation_config(tmp_path) == {"pad_token_id": 0, "eos_token_id": ends}


def test_all_else_of_the_base_stays(tmp_path, tokenizer):
    from transformers import GenerationConfig

    GenerationConfig(eos_token_id=7, pad_token_id=9, top_k=4, do_sample=True).save_pretrained(tmp_path)
    write_generation_config(tmp_path, tokenizer, load_generation_config(tmp_path))
    read = GenerationConfig.from_pretrained(tmp_path)
    assert (read.eos_token_id, read.pad_token_id, read.top_k, read.do_sample) == ([7, 0], 9, 4, True)


@pytest.mark.parametrize("found", ["</s>", [1, None], -1, True, 1.5, {"a": 1}])
def test_an_end_that_is_no_token_is_refused_by_name(tmp_path, found):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": found}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id=.*expected the id of a token"):
        load_generation_config(tmp_path)


def test_a_folder_without_one_says_nothing(tmp_path):
    assert stop_tokens(load_generation_config(tmp_path)) == []
