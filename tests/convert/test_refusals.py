"""What cannot be converted is refused, and the message says why."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from rlm_mhc import ModelConfig, fn
from rlm_mhc.convert import from_llama, upcycle
from rlm_mhc.convert.fields import ours_from_fields
from rlm_mhc.convert.layouts import ARCHITECTURES
from rlm_mhc.testing import largest_difference


@pytest.fixture
def folder(theirs, tmp_path):
    theirs().save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def change(folder, **changes):
    file = folder / "config.json"
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in fields.items() if value != "absent"}))


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("llama", {"model_type": "gemma"}, "model_type='gemma': expected one of llama, mistral, qwen2, qwen3"),
        ("llama", {"model_type": ["llama"]}, "model_type"),
        ("llama", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map=.*code of its own"),
        # No key of LlamaConfig, but transformers' caches and masks read it.
        ("llama", {"sliding_window": 8}, "sliding_window=8: .*give max_seq_len=8"),
        ("llama", {"layer_types": ["sliding_attention"] * 2}, "layer_types=.*only full_attention"),
        ("llama", {"is_causal": False}, "is_causal=False: this library has only True"),
        ("llama", {"attention_chunk_size": 8}, "attention_chunk_size=8: this library has only None"),
        ("llama", {"per_layer_config": {"0": {"intermediate_size": 8}}}, "per_layer_config=.*only None"),
        ("llama", {"quantization_config": {"bits": 4}}, r"quantization_config=.*model\.dequantize"),
        ("llama", {"attention_dropout": 0.1}, r"attention_dropout=0\.1: this library has only 0\.0"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu': this library has only 'silu'"),
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"hidden_size": "absent"}, "has no 'hidden_size'"),
        ("llama", {"hidden_size": "large"}, "theirs: hidden_dim='large': expected a whole number"),
        ("llama", {"num_hidden_layers": 3}, r"missing model\.layers\.2\.input_layernorm\.weight"),
        (
            "llama",
            {"intermediate_size": 97},
            r"model\.layers\.0\.mlp\.gate_proj\.weight has \(96, 64\), not \(97, 64\)",
        ),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rotary embedding .*llama3"),
        ("llama", {"rope_parameters": "absent", "rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary .*linear"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rotary .*linear"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 1.0}}, "rotary .*dynamic"),
        # transformers takes rope_scaling where there are both.
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rotary .*linear"),
        ("mistral", {"sliding_window": 32, "use_sliding_window": False}, "sliding_window=32"),
        (
            "llama",
            {"partial_rotary_factor": 0.5, "rope_parameters": "absent"},
            r"'partial_rotary_factor': 0\.5",
        ),
        ("llama", {"rope_parameters": [1]}, "expected a group of keys"),
        ("mistral", {"sliding_window": 32}, "sliding_window=32: .*give max_seq_len=32"),
        ("mistral", {"sliding_window": "absent", "max_position_embeddings": 5000}, "sliding_window=4096"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32}, "sliding_window=32"),
        ("qwen3", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
        ("qwen3", {"layer_types": 3}, "layer_types=3"),
    ],
)
def test_a_config_that_means_something_else(theirs, tmp_path, kind, changes, words):
    theirs(kind).save_pretrained(tmp_path / "theirs")
    change(tmp_path / "theirs", **changes)
    with pytest.raises(ValueError, match=words):
        upcycle(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"mhc_flow": 2}, r"unknown choice 'mhc_flow' \(did you mean 'mhc_flows'"),
        ({"hidden_dim": 2}, "unknown choice 'hidden_dim'"),
        ({"mhc_flows": 1}, "mhc_flows=1: one stream is a residual already"),
        ({"mhc_preset": "papr"}, "did you mean 'paper'"),
        ({"mhc_preset": "kron", "mhc_flows": 3}, "a power of 2"),
        ({"max_seq_len": 65}, "max_seq_len=65: more than the max_position_embeddings=64"),
    ],
)
def test_a_choice_that_is_none(folder, choices, words):
    with pytest.raises(ValueError, match=words):
        from_llama(folder, **choices)


def test_streams_that_shrink_layer_by_layer(theirs):
    with pytest.raises(ValueError, match=r"adds 1e-06 in every sum of Sinkhorn.*after 4 layers .*off by 8e-06"):
        from_llama(theirs(num_hidden_layers=4), mhc_preset="deepseek_v4")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.0.self_attn.q_proj.bias", r"unknown weight 'model\.layers\.0\.self_attn\.q_proj\.bias'"),
        ("model.layers.0.mlp.up_proj.weight_scale", "LlamaForCausalLM has none of that name"),
        ("model.layers.2.input_layernorm.weight", r"unexpected model\.layers\.2\.input_layernorm\.weight"),
        ("embed_tokens.weight", r"did you mean 'model\.embed_tokens\.weight'"),
    ],
)
def test_a_weight_that_is_in_no_table(folder, name, words):
    file = folder / "model.safetensors"
    save_file(load_file(file) | {name: torch.ones(64)}, file)
    with pytest.raises(ValueError, match=words):
        from_llama(folder)


def test_a_base_model_without_its_head(theirs):
    with pytest.raises(ValueError, match=r"LlamaModel: unknown weight 'embed_tokens\.weight'"):
        from_llama(theirs().model)


def test_damaged_missing_and_pickled_weights_are_named(theirs, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        from_llama(tmp_path / "nope")
    folder = tmp_path / "theirs"
    theirs().save_pretrained(folder, max_shard_size="60KB")
    shard = sorted(folder.glob("model-*.safetensors"))[2]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=rf"{shard.name}: damaged"):
        upcycle(folder, tmp_path / "ours")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        from_llama(folder)
    for file in folder.glob("model*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        from_llama(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: a pickle.*save_pretrained"):
        from_llama(folder)
    assert not (tmp_path / "ours").exists()


def test_a_tied_head_may_be_written_but_not_differ(theirs, tmp_path):
    theirs(tie_word_embeddings=True).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, file)
    assert from_llama(tmp_path)[1].tie_embeddings
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(ValueError, match="tie_word_embeddings is true, but"):
        from_llama(tmp_path)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_keys_that_the_config_class_does_not_know_pass_and_are_named(theirs, tmp_path, kind):
    model = theirs(kind)
    model.save_pretrained(tmp_path)
    expected = from_llama(tmp_path)[1]
    unknown = {
        "_model_name_or_path": "x",
        "unk_token_id": 0,
        "unsloth_fixed": True,
        "_flash_attn_2_enabled": True,
        "is_llama_config": True,
        "rope_interleaved": False,
        "hiden_size": 3,
    }
    known = {"sliding_window": None, "quantization_config": None, "rope_scaling": None, "attention_dropout": 0}
    change(tmp_path, **unknown, **known, temperature=0.6)
    words = rf"keys of config\.json without effect, as {ARCHITECTURES[kind].model_class} .*: {', '.join(unknown)}$"
    with pytest.warns(UserWarning, match=words) as warned:
        assert from_llama(tmp_path)[1] == expected
    assert [warning.filename for warning in warned] == [__file__]


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 1.0, "rope_theta": 500.0}},
        {"rope_parameters": "absent", "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_parameters": "absent", "rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 1}},
        {"rope_parameters": "absent", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
        {"rope_parameters": {"rope_theta": 500.0, "type": "default"}},
    ],
    ids=str,
)
def test_a_rotary_embedding_that_is_not_scaled(theirs, tmp_path, changes):
    theirs().save_pretrained(tmp_path)
    change(tmp_path, **changes)
    params, config = from_llama(tmp_path)
    tokens = torch.randint(101, (2, 30))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits
    assert config.rope_theta == 500.0
    assert largest_difference(fn.forward(params, tokens, config), expected) < 1e-5


def test_what_changes_nothing_is_taken(theirs, tmp_path):
    theirs("mistral").save_pretrained(tmp_path)
    change(tmp_path, sliding_window=32)
    assert from_llama(tmp_path, max_seq_len=32)[1].max_seq_len == 32
    change(tmp_path, sliding_window=64, rope_parameters="absent", rope_theta=77.0, rope_scaling=None)
    assert from_llama(tmp_path)[1].rope_theta == 77.0
    file = tmp_path / "model.safetensors"
    names = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
    save_file(load_file(file) | {name: torch.ones(8) for name in names}, file)
    from_llama(tmp_path)


def test_configs_of_published_models_are_read():
    smol = dict(
        architectures=["LlamaForCausalLM"],
        attention_bias=False,
        attention_dropout=0.0,
        bos_token_id=0,
        eos_token_id=0,
        hidden_act="silu",
        hidden_size=576,
        initializer_range=0.041666666666666664,
        intermediate_size=1536,
        is_llama_config=True,
        max_position_embeddings=8192,
        model_type="llama",
        num_attention_heads=9,
        num_hidden_layers=30,
        num_key_value_heads=3,
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_interleaved=False,
        rope_scaling=None,
        rope_theta=100000,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
        transformers_version="4.40.1",
        use_cache=True,
        vocab_size=49152,
    )
    qwen = dict(
        architectures=["Qwen2ForCausalLM"],
        attention_dropout=0.0,
        bos_token_id=151643,
        eos_token_id=151643,
        hidden_act="silu",
        hidden_size=896,
        initializer_range=0.02,
        intermediate_size=4864,
        max_position_embeddings=32768,
        max_window_layers=24,
        model_type="qwen2",
        num_attention_heads=14,
        num_hidden_layers=24,
        num_key_value_heads=2,
        rms_norm_eps=1e-06,
        rope_theta=1000000.0,
        sliding_window=32768,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
        transformers_version="4.40.1",
        use_cache=True,
        use_mrope=False,
        use_sliding_window=False,
        vocab_size=151936,
    )
    small, medium = (ModelConfig(**ours_from_fields(fields, ""), mhc_enabled=False) for fields in (smol, qwen))
    assert (small.rope_theta, small.head_width, fn.count(small)) == (1e5, 64, 134_515_008)
    assert (medium.qkv_bias, medium.kv_heads, fn.count(medium)) == (True, 2, 494_032_768)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_absent_keys_mean_what_they_mean_to_transformers(kind):
    defaults, row = AutoConfig.for_model(kind), ARCHITECTURES[kind]
    derived = {"head_dim": defaults.hidden_size // defaults.num_attention_heads, "num_key_value_heads": 32}
    for key, value in row.absent.items():
        expected = derived[key] if value is None else value
        if kind != "qwen2" or key != "head_dim":  # which Qwen2 always derives
            found = getattr(defaults, key)
            assert found == expected or (key == "sliding_window" and found == 4096), key
    assert all(getattr(defaults, key) == value for key, value in row.fixed.items())
    assert hasattr(transformers, row.model_class)
