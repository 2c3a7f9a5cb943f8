"""Models whose norms and biases have another dtype than their matrices, as some published ones do."""

import json

import torch
from transformers import AutoModelForCausalLM

from rlm_mhc import fn, load_pretrained
from rlm_mhc.convert import from_llama, to_llama, upcycle
from rlm_mhc.model import RLMModel


def label(folder):
    return json.loads((folder / "config.json").read_text())["dtype"]


def mixed(theirs):
    model = theirs("qwen2").to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data = parameter.data.float()
    return model


def test_a_folder_that_is_upcycled_keeps_its_dtypes_and_is_labelled_by_its_matrices(theirs, tmp_path):
    model = mixed(theirs)
    model.save_pretrained(tmp_path / "theirs")
    config = upcycle(tmp_path / "theirs", tmp_path / "mhc", mhc_flows=2)
    assert label(tmp_path / "mhc") == "bfloat16"
    params, _ = load_pretrained(tmp_path / "mhc")
    assert params.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert params.norm.weight.dtype == params.layers[0].self_attn.q_proj.bias.dtype == torch.float32
    assert {w.dtype for w in params.layers[0].attn_mhc} == {torch.float32}
    tokens = torch.randint(101, (2, 9), generator=torch.Generator().manual_seed(0))
    theirs_in_bf16 = model.to(torch.bfloat16)(tokens).logits.float()
    torch.testing.assert_close(fn.forward(params, tokens, config).float(), theirs_in_bf16, rtol=0.05, atol=0.2)
    assert fn.generate(params, tokens, config, max_new_tokens=3).tokens.shape == (2, 12)
    assert RLMModel.from_pretrained(tmp_path / "mhc").dtype == torch.bfloat16

    assert to_llama(tmp_path / "mhc", tmp_path / "back") == "qwen2"
    assert label(tmp_path / "back") == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").dtype == torch.bfloat16


def test_new_mhc_weights_are_as_wide_as_the_matrices_not_the_norms(theirs):
    model = theirs("llama")
    model.model.norm.double()
    params, _ = from_llama(model, mhc_flows=2)
    assert params.norm.weight.dtype == torch.float64
    assert params.layers[0].attn_mhc.phi.dtype == params.layers[0].mlp.up_proj.weight.dtype == torch.float32
