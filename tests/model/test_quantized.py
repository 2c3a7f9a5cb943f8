"""Quantised models: what transformers wrote loads again, with the same logits."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import rlm_mhc
from rlm_mhc.convert import to_llama


def bits_and_bytes(**options):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return BitsAndBytesConfig(**options)


def torchao_int8():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


KINDS = {
    "8 bit": lambda: bits_and_bytes(load_in_8bit=True),
    "4 bit": lambda: bits_and_bytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "torchao int8": torchao_int8,
}


@pytest.fixture(params=KINDS)
def quantized(request, make_model, tmp_path):
    """A model that was quantised while it was loaded, its logits before, and the folder that it was saved into."""
    plain = make_model(hidden_dim=64, ffn_dim=128)
    plain.save_pretrained(tmp_path / "plain")
    options = dict(quantization_config=KINDS[request.param](), device_map="cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **options)
    model.save_pretrained(tmp_path / "quantized")
    return model, plain, tmp_path / "quantized"


def test_a_quantized_folder_gives_the_same_logits_again(quantized, tokens):
    model, plain, folder = quantized
    logits = model(tokens).logits
    assert model.model.layers[0].attn_mhc.phi.dtype == torch.float32
    assert not torch.equal(logits, plain(tokens).logits)
    again = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    assert torch.equal(again(tokens).logits, logits)


def test_damage_in_a_quantized_folder_is_refused(quantized):
    *_, folder = quantized
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")


def test_quantized_weights_are_no_tree(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match=r"quantised \(fp8\); load it by RLMModel"):
        rlm_mhc.load_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"quantised \(fp8\)"):
        to_llama(tmp_path, tmp_path / "llama")
