"""Modules are made in torch's default dtype, as those of transformers are, and from then on it changes nothing."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlm_mhc import fn
from rlm_mhc.model import RLMModel
from rlm_mhc.testing import assert_trees_close, small_config


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16], ids=str)
def default(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def test_a_new_model_has_the_default_dtype_as_llama_and_mhc_at_least_fp32(default):
    theirs = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=8)
    )
    assert {parameter.dtype for parameter in theirs.parameters()} == {default}
    config = small_config(mhc_preset="deepseek_v4")
    torch.manual_seed(5)
    model = RLMModel(config)
    assert_trees_close(model.tree(), fn.init(config, seed=5, dtype=default), 0.0)
    named = dict(model.named_parameters())
    assert {p.dtype for name, p in named.items() if "mhc" not in name} == {default}
    assert {p.dtype for name, p in named.items() if "mhc" in name} == {torch.promote_types(default, torch.float32)}


def test_a_loaded_model_computes_the_same_under_another_default_dtype(default, make_model, tokens, tmp_path):
    torch.set_default_dtype(torch.float32)
    model = make_model()
    model.save_pretrained(tmp_path)
    torch.set_default_dtype(default)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = RLMModel.from_pretrained(tmp_path, dtype=dtype).eval()
        assert loaded.dtype == dtype
        assert {p.dtype for name, p in loaded.named_parameters() if "mhc" in name} == {torch.float32}
        here = loaded(tokens).logits, loaded.generate(tokens, max_new_tokens=3, do_sample=False)
        torch.set_default_dtype(torch.float32)
        there = loaded(tokens).logits, loaded.generate(tokens, max_new_tokens=3, do_sample=False)
        torch.set_default_dtype(default)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(here, there, strict=True))
