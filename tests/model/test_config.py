import json

import pytest
import yaml
from transformers import AutoConfig

from rlm_mhc import ModelConfig, fn, load_pretrained, save_pretrained
from rlm_mhc.model import RLMConfig, RLMModel
from rlm_mhc.testing import assert_trees_close, small_config


def test_every_field_has_its_name_and_that_of_transformers():
    config = RLMConfig(hidden_dim=64, num_heads=4, num_hidden_layers=3, tie_word_embeddings=False)
    assert config.model_config == ModelConfig(hidden_dim=64, num_heads=4, num_layers=3, tie_embeddings=False)
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (64, 4, 3)
    assert (config.num_key_value_heads, config.max_position_embeddings, config.vocab_size) == (4, 8192, 32000)
    assert RLMConfig().model_config == ModelConfig()
    assert config.to_dict()["hidden_size"] == config.to_dict()["hidden_dim"] == 64
    assert RLMConfig.from_dict(config.to_dict()).model_config == config.model_config


def test_wrong_values_and_misspelt_names_are_refused():
    with pytest.raises(ValueError, match=r"num_layers=0: expected"):
        RLMConfig(num_layers=0)
    with pytest.raises(ValueError, match="did you mean 'hidden_dim'"):
        RLMConfig(hiden_dim=64)
    with pytest.raises(ValueError, match="did you mean 'mhc_flows'"):
        RLMConfig(mhc_flow=4)
    with pytest.raises(ValueError, match="hidden_size=8 and hidden_dim=64: two names of one field"):
        RLMConfig(hidden_size=8, hidden_dim=64)
    config = RLMConfig()
    config.mhc_flows = 0
    with pytest.raises(ValueError, match="mhc_flows=0"):
        config.model_config  # noqa: B018


def test_it_comes_back_from_both_files_and_from_either(tmp_path):
    config = RLMConfig(**{"hidden_dim": 64, "num_heads": 4, "mhc_flows": 2, "eos_token_id": 5})
    config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    section = yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]
    assert {name: fields[name] for name in section} == section
    assert RLMConfig(**section).model_config == config.model_config
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
    assert AutoConfig.from_pretrained(tmp_path).eos_token_id == 5
    (tmp_path / "config.yaml").rename(tmp_path / "aside")
    assert RLMConfig.from_pretrained(tmp_path).model_config == config.model_config
    (tmp_path / "aside").rename(tmp_path / "config.yaml")
    (tmp_path / "config.json").unlink()
    assert RLMConfig.from_pretrained(tmp_path).model_config == config.model_config


def test_what_others_add_to_a_config_does_no_harm(tmp_path):
    model = RLMModel(small_config())
    model.config.note = "of mine"
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).note == "of mine"
    assert RLMModel.from_pretrained(tmp_path).config.note == "of mine"
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"note"', '"mhc_flow"'))
    with pytest.raises(ValueError, match=r"config\.json: unknown key 'mhc_flow' \(did you mean 'mhc_flows'"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("missing", ["config.json", "config.yaml"])
def test_checkpoints_with_only_one_of_the_files_load(tmp_path, missing):
    config = small_config()
    params = fn.init(config)
    save_pretrained(tmp_path, params, config)
    (tmp_path / missing).unlink()
    loaded, same = load_pretrained(tmp_path)
    assert same == config
    assert_trees_close(loaded, params, 0)
    assert_trees_close(RLMModel.from_pretrained(tmp_path).tree(), params, 0)


def test_files_that_differ_are_refused(tmp_path):
    RLMConfig(hidden_dim=64, num_heads=4).save_pretrained(tmp_path)
    fields = yaml.safe_load((tmp_path / "config.yaml").read_text())
    fields["model"]["mhc_sinkhorn_iters"] = 3
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(fields))
    with pytest.raises(ValueError, match="do not say the same: mhc_sinkhorn_iters=20 and mhc_sinkhorn_iters=3"):
        RLMConfig.from_pretrained(tmp_path)
