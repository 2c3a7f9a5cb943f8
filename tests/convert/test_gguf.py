"""A model in a GGUF file, as llama.cpp writes it, upcycled."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlm_mhc
from rlm_mhc import fn
from rlm_mhc.convert import from_llama, to_llama, upcycle
from rlm_mhc.data import Source, train_tokenizer
from rlm_mhc.testing import largest_difference

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*without effect.*_model_name_or_path")
TEMPLATE = "{% for m in messages %}<|endoftext|>{{ m.content }}{% endfor %}"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers.": "blk.",
}


def by_pairs(weight, heads):
    """llama.cpp rotates neighbouring dimensions, transformers the two halves of a head."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(file, model, tokenizer, *, architecture="llama", without=(), extra=lambda writer: None):
    """What llama.cpp's converter writes of a Llama, in fp32."""
    config, writer = model.config, gguf.GGUFWriter(file, architecture)
    writer.add_name("small")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(state["vocab"], key=state["vocab"].get))
    writer.add_token_types([3] + [1] * (len(state["vocab"]) - 1))
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in state["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    extra(writer)
    for name, weight in model.state_dict().items():
        if name in without or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        value = weight.numpy()
        if "q_proj" in name or "k_proj" in name:
            value = by_pairs(value, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(Source("words", "words", lambda bad: iter(["the list of words grows " * 30])), 270)


@pytest.fixture
def model(theirs, tokenizer):
    return theirs(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0)


def test_a_gguf_becomes_the_model_it_was_made_of_with_its_tokenizer(model, tokenizer, tmp_path):
    file = write_gguf(tmp_path / "small model.gguf", model, tokenizer)
    upcycle(file, tmp_path / "ours")
    params, config = rlm_mhc.load_pretrained(tmp_path / "ours")
    assert (config.max_seq_len, config.rope_theta, config.tie_embeddings) == (64, 500.0, False)
    tokens = torch.randint(len(tokenizer), (2, 20))
    with torch.no_grad():
        assert largest_difference(fn.forward(params, tokens, config), model(tokens).logits) < 1e-5
    own = AutoTokenizer.from_pretrained(tmp_path / "ours")
    text = "the list shrinks"
    assert own(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (own.eos_token, own.chat_template) == ("<|endoftext|>", TEMPLATE)
    asked = own.apply_chat_template([{"role": "user", "content": "words"}])["input_ids"]
    assert asked == [0, *tokenizer("words")["input_ids"]]
    assert json.loads((tmp_path / "ours" / "generation_config.json").read_text())["eos_token_id"] == 0
    to_llama(tmp_path / "ours", tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(back[name], weight) for name, weight in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == TEMPLATE


def test_a_module_that_transformers_read_from_a_gguf_is_taken(model, tokenizer, tmp_path):
    file = write_gguf(tmp_path / "small.gguf", model, tokenizer)
    module = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    assert module.config.quantization_config.quant_method == "gguf"
    params, config = from_llama(module)
    tokens = torch.randint(len(tokenizer), (2, 20))
    assert largest_difference(fn.forward(params, tokens, config), module(tokens).logits) < 1e-5


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_gguf_cut_short_is_named(model, tokenizer, tmp_path, share):
    file = write_gguf(tmp_path / "small.gguf", model, tokenizer)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"^\S+small\.gguf: ([^\n]*is the file whole|neither a folder)[^\n]*$"):
        upcycle(file, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architecture": "mamba9"}, "architecture mamba9 is not supported"),
        ({"architecture": "starcoder2"}, "model_type='starcoder2': expected one of llama"),
        ({"without": ["model.layers.1.mlp.up_proj.weight"]}, r"has no model\.layers\.1\.mlp\.up_proj\.weight"),
        ({"extra": lambda writer: writer.add_rope_scaling_factor(8.0)}, "rotary embedding is scaled"),
        ({"extra": lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(8, "f"))}, "rotary embedding is sc"),
    ],
    ids=["unknown", "not served", "a part", "linear scaling", "factors"],
)
def test_what_would_become_another_model_is_refused(model, tokenizer, tmp_path, options, words):
    file = write_gguf(tmp_path / "small.gguf", model, tokenizer, **options)
    with pytest.raises(ValueError, match=rf"small\.gguf: .*{words}"):
        from_llama(file)


def test_a_scaling_by_one_changes_nothing(model, tokenizer, tmp_path):
    file = write_gguf(tmp_path / "a.gguf", model, tokenizer, extra=lambda writer: writer.add_rope_scaling_factor(1.0))
    assert from_llama(file)[1].rope_theta == 500.0


def test_what_is_no_gguf_and_what_is_missing_is_said(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGML model")
    with pytest.raises(ValueError, match=r"model\.gguf: neither a folder nor a GGUF file"):
        from_llama(tmp_path / "model.gguf")
    with pytest.raises(FileNotFoundError, match=r"none\.gguf: no such folder or GGUF file"):
        from_llama(tmp_path / "none.gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else find(name, *a))
    with pytest.raises(ValueError, match=r"model\.gguf: .*missing; pip install gguf"):
        from_llama(tmp_path / "model.gguf")
