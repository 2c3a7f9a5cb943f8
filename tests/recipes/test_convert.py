import copy
import json

import pytest
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import rlm_mhc
from rlm_mhc import fn
from rlm_mhc.testing import assert_as_accurate, random_batch


@pytest.fixture
def source(tmp_path):
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = Qwen2ForCausalLM(Qwen2Config(**shape, intermediate_size=48, vocab_size=61, max_position_embeddings=64))
    model.save_pretrained(tmp_path / "qwen")
    return model.eval()


def test_there_and_back(recipe, source, tmp_path):
    there = recipe("convert", f"source={tmp_path / 'qwen'}", f"output_dir={tmp_path / 'mhc'}", "mhc_flows=2")
    assert there.code == 0, there.err
    assert "2 streams of paper, 2 layers, width 32" in there.out
    params, config = rlm_mhc.load_pretrained(tmp_path / "mhc")
    tokens = random_batch(config, 2, 20).tokens
    plain, exact = (model(tokens).logits for model in (source, copy.deepcopy(source).double()))
    assert_as_accurate(fn.forward(params, tokens, config), plain, exact)
    folders = [f"source={tmp_path / 'mhc'}", f"output_dir={tmp_path / 'back'}"]
    back = recipe("convert", *folders, "direction=to_llama")
    assert back.code == 0, back.err
    assert back.out.startswith(f"{tmp_path / 'back'}: qwen2, {source.num_parameters():,} parameters")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert all((again.state_dict()[name] == weight).all() for name, weight in source.state_dict().items())
    assert "not an empty folder" in recipe("convert", *folders, "direction=to_llama").last_error


def test_keys_without_effect_are_named_in_one_line(recipe, source, tmp_path):
    file = tmp_path / "qwen" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"unsloth_fixed": True, "mlp_bias": False}))
    result = recipe("convert", f"source={tmp_path / 'qwen'}", f"output_dir={tmp_path / 'mhc'}")
    assert result.code == 0, result.err
    note = "keys of config.json without effect, as Qwen2ForCausalLM does not know them: unsloth_fixed, mlp_bias"
    assert result.out.startswith(f"note: {tmp_path / 'qwen'}: {note}\n{tmp_path / 'mhc'}: 4 streams")


def test_mistakes_are_one_line(recipe, source, tmp_path):
    qwen = f"source={tmp_path / 'qwen'}"
    output = f"output_dir={tmp_path / 'mhc'}"
    (tmp_path / "A-135M (1).Q4_1.gguf").write_bytes(b"PK")
    for arguments, words in [
        ([], "source: name a folder"),
        ([qwen], "output_dir: name a folder"),
        ([qwen, output, "mhc_flow=2"], "unknown key 'mhc_flow' (did you mean 'mhc_flows'?)"),
        ([qwen, output, "mhc_preset=papr"], "did you mean 'paper'"),
        ([qwen, output, "direction=to_llama", "mhc_flows=2"], "mhc_flows: a choice for direction=to_mhc"),
        ([qwen, output, "direction=to_llama"], "not a model of this library"),
        ([f"source={tmp_path / 'nope'}", output], "nope: no such folder"),
        ([f"source={tmp_path / 'A-135M (1).Q4_1.gguf'}", output], "A-135M (1).Q4_1.gguf: neither a folder nor a GGUF"),
    ]:
        result = recipe("convert", *arguments)
        assert result.code == 2
        assert words in result.last_error
    assert not (tmp_path / "mhc").exists()
