"""A model whose hyper-connections do nothing as the model of transformers that it is."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import rlm_mhc
from rlm_mhc import fn
from rlm_mhc.convert import from_llama, to_llama, upcycle
from rlm_mhc.convert.gates import closed_specs
from rlm_mhc.testing import random_batch, small_config
from rlm_mhc.testing.models import perturbed, with_entry
from rlm_mhc.tree import map_named, named_leaves, tree_map


def closed(config):
    """Weights of the library's own start without their gates, all others away from it."""
    params = map_named(lambda name, w: perturbed(w) if "mhc" not in name else w, fn.init(config))
    return map_named(lambda name, w: w * 0 if name.endswith("alpha") else w, params)


def changed(params, name, amount):
    """One weight, and more than one entry of it, changed."""
    return map_named(
        lambda other, w: w + amount * torch.arange(w.numel()).view(w.shape) if other == name else w, params
    )


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_there_and_back_is_bit_equal(theirs, same_logits, tmp_path, kind):
    model = theirs(kind)
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    upcycle(tmp_path / "theirs", tmp_path / "ours")
    assert to_llama(tmp_path / "ours", tmp_path / "back", shard_bytes=90_000) == kind.replace("mistral", "llama")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2
    expected, found = model.state_dict(), back.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    tokens = torch.randint(101, (2, 20))
    same_logits(back(tokens).logits, model, tokens)
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    assert back.config.eos_token_id == 2
    assert from_llama(tmp_path / "back")[1] == rlm_mhc.load_pretrained(tmp_path / "ours")[1]


@pytest.mark.parametrize(
    "changes",
    [{}, {"mhc_enabled": False}, {"qkv_bias": True}, {"qk_norm": True}, {"tie_embeddings": False, "head_dim": 6}]
    + [{"mhc_preset": name} for name in ("hc", "deepseek_v4", "single_pass")],
    ids=str,
)
def test_logits_of_a_closed_model_are_kept(same_logits, tmp_path, changes):
    config = small_config(rope_theta=300.0, **changes)
    params, tokens = closed(config), random_batch(config, 2, 30).tokens
    to_llama(params, tmp_path / "theirs", config=config)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    same_logits(fn.forward(params, tokens, config), theirs, tokens)
    # Other programs look for it there.
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["rope_theta"] == 300.0


def test_bf16_stays_bf16(tmp_path):
    config = small_config(mhc_enabled=False)
    to_llama(fn.init(config, dtype=torch.bfloat16), tmp_path / "theirs", config=config)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "amount", "words"),
    [
        (
            "layers.1.attn_mhc.alpha",
            1e-3,
            r"layers\.1\.attn_mhc\.alpha: the gates are open, their logits vary by .*e-04",
        ),
        ("layers.0.mlp_mhc.bias", 1e-3, r"layers\.0\.mlp_mhc\.bias: no plain residual.* off by \d\.\de-03"),
        ("layers.1.mlp_mhc.bias", 1e-4, r"layers\.1\.mlp_mhc\.bias"),
    ],
)
def test_open_gates_are_named_with_how_much(tmp_path, name, amount, words):
    config = small_config()
    params = changed(closed(config), name, amount)
    with pytest.raises(ValueError, match=words):
        to_llama(params, tmp_path / "theirs", config=config)
    assert not (tmp_path / "theirs").exists()


def test_a_model_that_was_trained_is_no_llama(theirs, tmp_path):
    params, config = from_llama(theirs())
    grads = torch.func.grad(fn.loss)(params, random_batch(config, 2, 20), config)
    trained = tree_map(lambda w, g: w - 0.1 * g, params, grads)
    with pytest.raises(ValueError, match=r"layers\.0\.attn_mhc\.(alpha|bias): "):
        to_llama(trained, tmp_path / "theirs", config=config)


def test_gates_that_are_not_numbers_are_refused(tmp_path):
    config = small_config()
    for leaf in ("phi", "alpha", "bias"):
        # One of them alone, the last: of phi and alpha that of `res`.
        params = with_entry(closed(config), f"layers.1.mlp_mhc.{leaf}", -1, torch.nan)
        with pytest.raises(ValueError, match=r"layers\.1\.mlp_mhc"):
            to_llama(params, tmp_path / "theirs", config=config)


def test_what_no_architecture_has_is_refused(tmp_path):
    config = small_config(qkv_bias=True, qk_norm=True)
    with pytest.raises(ValueError, match="qkv_bias=True and qk_norm=True"):
        to_llama(closed(config), tmp_path / "theirs", config=config)
    with pytest.raises(ValueError, match="a parameter tree needs one"):
        to_llama(closed(config), tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"the tree: does not fit its config; missing lm_head\.weight"):
        to_llama(closed(small_config()), tmp_path / "theirs", config=small_config(tie_embeddings=False))


def test_a_changed_byte_of_a_checkpoint_is_found(tmp_path):
    config = small_config(mhc_enabled=False)
    rlm_mhc.save_pretrained(tmp_path / "ours", fn.init(config), config)
    file = tmp_path / "ours" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        to_llama(tmp_path / "ours", tmp_path / "theirs")
    assert [file.name for file in tmp_path.iterdir()] == ["ours"]


def test_the_closed_start_covers_every_hyper_connection():
    for preset in ("paper", "deepseek_v4"):
        config = small_config(mhc_preset=preset)
        assert list(closed_specs(config)) == [name for name in named_leaves(fn.init(config)) if "mhc" in name]
