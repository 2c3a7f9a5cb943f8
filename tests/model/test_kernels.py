"""The kernels of the models of transformers, by argument of `from_pretrained` and config."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from rlm_mhc import fn
from rlm_mhc.kernels import selftest
from rlm_mhc.kernels.mixing import TRITON
from rlm_mhc.model import RLMConfig, RLMModel
from rlm_mhc.model import kernels as model_kernels
from rlm_mhc.model.kernels import kernels_for
from rlm_mhc.testing import assert_as_accurate, small_config
from rlm_mhc.testing.models import double


def fused_calls(monkeypatch):
    calls = []
    run = TRITON.block
    counted = TRITON._replace(block=lambda *args: calls.append(1) or run(*args))
    monkeypatch.setattr(model_kernels, "TRITON", counted)
    return calls


@pytest.mark.parametrize("preset", ["paper", "deepseek_v4", "single_pass"])
def test_triton_kernels_are_as_exact_as_the_reference(make_model, tokens, tmp_path, monkeypatch, preset):
    make_model(mhc_preset=preset).save_pretrained(tmp_path)
    calls = fused_calls(monkeypatch)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, kernels="reference")
    assert (plain.config.kernels, calls) == ("reference", [])
    fused = AutoModelForCausalLM.from_pretrained(tmp_path, kernels="triton")
    exact = fn.forward(double(plain.tree()), tokens, plain.config.model_config)
    assert_as_accurate(fused(tokens).logits, plain(tokens).logits, exact)
    assert len(calls) == 2

    def gradients(model):
        loss = model(tokens, labels=tokens, use_cache=False).loss
        return torch.autograd.grad(loss, list(model.parameters()))

    assert_as_accurate(gradients(fused), gradients(plain), gradients(plain.double()))


def test_generation_and_checkpointing_run_the_triton_kernels(make_model, tokens, monkeypatch):
    calls, model = fused_calls(monkeypatch), make_model()
    expected = model.generate(tokens, max_new_tokens=4, do_sample=False)
    model.config.kernels = "triton"
    assert torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False), expected)
    assert len(calls) == 2 * 4
    plain = torch.autograd.grad(model(tokens, labels=tokens, use_cache=False).loss, model.model.layers[0].attn_mhc.phi)
    model.train()
    model.gradient_checkpointing_enable()
    again = torch.autograd.grad(model(tokens, labels=tokens).loss, model.model.layers[0].attn_mhc.phi)
    assert torch.equal(plain[0], again[0])


def test_a_hooked_module_is_called_in_the_kernels_stead(make_model, tokens):
    model, seen = make_model(), []
    model.config.kernels = "triton"
    expected = model(tokens).logits
    model.model.layers[1].mlp_mhc.register_forward_hook(lambda *args: seen.append(1))
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *args: seen.append(2))
    torch.testing.assert_close(model(tokens).logits, expected)
    assert seen == [2, 1]


def test_the_choice_is_not_saved_and_a_wrong_one_is_named(make_model, tmp_path):
    model = make_model()
    model.config.kernels = "triton"
    model.save_pretrained(tmp_path)
    assert "kernels" not in json.loads((tmp_path / "config.json").read_text())
    assert AutoModel.from_pretrained(tmp_path).config.kernels == "auto"
    with pytest.raises(ValueError, match="kernels='liger': expected one of auto, reference, triton"):
        RLMConfig(kernels="liger")
    with pytest.raises(ValueError, match="mhc_preset='hc' makes res by unconstrained"):
        RLMModel(RLMConfig(mhc_preset="hc", hidden_dim=32, num_layers=1, num_heads=2, kernels="triton"))(
            torch.zeros(1, 2, dtype=torch.int64)
        )


def test_auto_takes_what_passes_its_self_test(monkeypatch):
    config, device = small_config(), torch.device("cuda")
    monkeypatch.setattr(selftest, "require_triton", lambda device: None)
    for failure, expected in ((None, TRITON), ("mix_post is off", fn.REFERENCE)):
        model_kernels._test_once.cache_clear()
        monkeypatch.setattr(selftest, "self_test", lambda *args, failure=failure: failure)
        if failure:
            with pytest.warns(UserWarning, match="mix_post is off"):
                assert kernels_for("auto", config, device, torch.float32) is expected
        assert kernels_for("auto", config, device, torch.float32) is expected
    assert kernels_for("auto", config.replace(mhc_enabled=False), device, torch.float32) is fn.REFERENCE
    assert kernels_for("auto", small_config(mhc_preset="hc"), device, torch.float32) is fn.REFERENCE
