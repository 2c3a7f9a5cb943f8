"""The module computes what `fn` computes, and is saved and loaded like any model of transformers."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

import rlm_mhc
from rlm_mhc import ModelConfig, fn
from rlm_mhc.model import RLMConfig, RLMModel
from rlm_mhc.testing import assert_as_accurate, assert_trees_close, small_config
from rlm_mhc.testing.models import double
from rlm_mhc.tree import named_leaves, tree_map

VARIANTS = [
    {},
    {"mhc_enabled": False},
    {"mhc_preset": "deepseek_v4", "tie_embeddings": False},
    {"mhc_preset": "single_pass", "qkv_bias": True, "qk_norm": True},
    {"mhc_preset": "hc", "mhc_flows": 3},
]
variants = pytest.mark.parametrize("changes", VARIANTS, ids=str)


def assert_same(loaded, model, tokens):
    """The same weights, and the same logits to rounding: weights read from disk lie in memory as in the file, and
    products of numbers off 64 bytes are summed in another order on some CPUs."""
    assert_trees_close(loaded.tree(), model.tree(), 0.0)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)


@variants
def test_logits_and_loss_are_those_of_fn(make_model, tokens, changes):
    model = make_model(**changes)
    output = model(tokens, labels=tokens)
    config = model.config.model_config
    assert torch.equal(output.logits, fn.forward(model.tree(), tokens, config))
    batch = fn.Batch(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(output.loss, fn.loss(model.tree(), batch, config))


@variants
def test_initial_weights_are_those_of_fn_init(changes):
    torch.manual_seed(7)
    model = RLMModel(small_config(**changes))
    expected = named_leaves(fn.init(small_config(**changes), seed=7))
    assert named_leaves(model.tree()).keys() == expected.keys()
    assert all(torch.equal(leaf, expected[name]) for name, leaf in named_leaves(model.tree()).items())
    own = {name.removeprefix("model.") for name, _ in model.named_parameters()}
    assert own == expected.keys()


@variants
def test_gradients_are_those_of_fn(make_model, tokens, changes):
    model = make_model(**changes)
    model(tokens, labels=tokens).loss.backward()
    config, batch = model.config.model_config, fn.Batch(tokens[:, :-1], tokens[:, 1:])
    params = tree_map(torch.Tensor.detach, model.tree())
    own = named_leaves(model.tree())
    plain, exact = (named_leaves(torch.func.grad(fn.loss)(p, batch, config)) for p in (params, double(params)))
    assert_as_accurate({name: own[name].grad for name in exact}, plain, exact)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("changes", [{}, {"mhc_preset": "single_pass"}], ids=str)
def test_recomputed_blocks_give_the_same_gradients(make_model, tokens, changes, reentrant):
    model = make_model(**changes).train()
    model(tokens, labels=tokens).loss.backward()
    kept = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    model(tokens, labels=tokens).loss.backward()
    assert all(torch.equal(p.grad, kept[name]) for name, p in model.named_parameters())


@variants
def test_a_hook_on_any_module_runs_and_changes_no_logit(make_model, tokens, changes):
    model, seen = make_model(**changes), []
    expected, metrics = model(tokens).logits, model.get_mhc_metrics(tokens)
    names = {name: module for name, module in model.named_modules() if name not in ("", "model", "model.layers")}
    for name, module in names.items():
        module.register_forward_hook(lambda *call, name=name: seen.append(name))
    assert torch.equal(model(tokens).logits, expected)
    assert set(seen) == names.keys()
    assert torch.equal(fn.forward(model.tree(), tokens, model.config.model_config), expected)
    assert model.get_mhc_metrics(tokens) == metrics


@variants
def test_caches_padding_and_beams(make_model, tokens, changes):
    model = make_model(**changes)
    options = dict(max_new_tokens=8, do_sample=False)
    expected = model.generate(tokens, use_cache=False, **options)
    assert torch.equal(model.generate(tokens, **options), expected)
    static = model.generate(tokens, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, expected)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    padded = model.generate(tokens, attention_mask=mask, pad_token_id=0, **options)
    alone = model.generate(tokens[:1, 4:], **options)
    assert torch.equal(padded[0, 4:], alone[0])
    beams = model.generate(tokens, num_beams=3, max_new_tokens=8)
    assert torch.equal(beams, model.generate(tokens, num_beams=3, max_new_tokens=8, use_cache=False))
    torch.manual_seed(0)
    drawn = model.generate(tokens, max_new_tokens=20, do_sample=True)
    torch.manual_seed(1)
    assert not torch.equal(drawn, model.generate(tokens, max_new_tokens=20, do_sample=True))


@pytest.mark.parametrize("make", [lambda c: DynamicCache(config=c), lambda c: StaticCache(c, max_cache_len=9)])
def test_logits_with_a_cache_equal_those_of_one_pass(make_model, tokens, make):
    model = make_model().double()
    with torch.no_grad():
        whole, cache = model(tokens).logits, make(model.config)
        parts = [model(part, past_key_values=cache).logits for part in tokens.split([5, 1, 3], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_eager_attention_gives_its_weights_and_the_same_logits(make_model, tokens):
    model = make_model()
    plain, exact = model(tokens).logits, fn.forward(double(model.tree()), tokens, small_config())
    model.set_attn_implementation("eager")
    output = model(tokens, output_attentions=True, output_hidden_states=True)
    assert_as_accurate(output.logits, plain, exact)
    assert [w.shape for w in output.attentions] == [(2, 4, 9, 9)] * 2
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 4, 9))
    assert [h.shape for h in output.hidden_states] == [(2, 9, 32)] * 3
    assert torch.equal(model(tokens, return_dict=False)[0], output.logits)
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, output.logits[:, -2:])


def test_attentions_and_hidden_states_follow_the_config(make_model, tokens, tmp_path):
    make_model().save_pretrained(tmp_path)
    options = dict(attn_implementation="eager", output_attentions=True, output_hidden_states=True)
    model = RLMModel.from_pretrained(tmp_path, **options)
    expected = model(tokens, output_attentions=True, output_hidden_states=True)
    for output in (model(tokens), model.model(tokens)):
        assert all(map(torch.equal, output.attentions, expected.attentions))
        assert all(map(torch.equal, output.hidden_states, expected.hidden_states))
    assert len(expected.attentions) == 2
    assert len(expected.hidden_states) == 3
    output = model(tokens, output_attentions=False, output_hidden_states=False)
    assert output.attentions is output.hidden_states is None
    model.config.output_attentions = model.config.output_hidden_states = False
    assert model(tokens).attentions is model(tokens).hidden_states is None
    model.config.return_dict = False
    assert torch.equal(model(tokens)[0], expected.logits)


def test_the_limit_on_length_is_that_of_the_config_at_the_call(make_model):
    model, tokens = make_model(), torch.arange(65).remainder(61).unsqueeze(0)
    with pytest.raises(ValueError, match="longer than max_seq_len=64"):
        model(tokens)
    model.config.max_position_embeddings = 65
    assert torch.equal(model(tokens).logits, fn.forward(model.tree(), tokens, small_config(max_seq_len=65)))


@pytest.mark.gpu
def test_flash_attention_equals_sdpa(make_model, tokens, tmp_path):
    pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    make_model(hidden_dim=64).save_pretrained(tmp_path)
    options = dict(dtype=torch.bfloat16, device_map="cuda")
    ours, flash = (
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name, **options)(tokens.cuda()).logits
        for name in ("sdpa", "flash_attention_2")
    )
    torch.testing.assert_close(flash, ours, rtol=2e-2, atol=2e-2)


@variants
def test_it_comes_back_from_disk_bit_equal_for_transformers_and_for_fn(make_model, tokens, tmp_path, changes):
    model = make_model(**changes)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is RLMModel
    assert not any(info.values())
    assert not loaded.training
    assert_same(loaded, model, tokens)
    params, config = rlm_mhc.load_pretrained(tmp_path)
    assert config == model.config.model_config == AutoConfig.from_pretrained(tmp_path).model_config
    assert_trees_close(params, model.tree(), 0.0)
    rlm_mhc.save_pretrained(tmp_path / "again", params, config)
    assert_same(RLMModel.from_pretrained(tmp_path / "again"), model, tokens)


def test_shards_are_read_whole_and_a_missing_one_is_named(make_model, tokens, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model, tokens)
    assert_trees_close(rlm_mhc.load_pretrained(tmp_path)[0], model.tree(), 0.0)
    shards[1].unlink()
    for load in (RLMModel.from_pretrained, rlm_mhc.load_pretrained):
        with pytest.raises(FileNotFoundError, match=shards[1].name):
            load(tmp_path)


@pytest.mark.parametrize("load", [RLMModel.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_damaged_truncated_mismatched_and_foreign_files_are_refused(make_model, tmp_path, load):
    model = make_model()
    model.save_pretrained(tmp_path)
    file, description = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, fields = file.read_bytes(), json.loads(description.read_text())
    file.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged, .* is not what was written"):
        load(tmp_path)
    assert load(tmp_path, verify=False) is not None
    file.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        load(tmp_path)
    file.write_bytes(whole)
    (tmp_path / "config.yaml").unlink()
    description.write_text(json.dumps(fields | {"num_layers": 3}))
    with pytest.raises(ValueError, match=r"missing layers\.2\.attn_mhc\.phi.*, unexpected nothing"):
        load(tmp_path)
    description.write_text(json.dumps(fields | {"ffn_dim": 50}))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate_proj\.weight has \(48, 32\), not \(50, 32\)"):
        load(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load(tmp_path)


def test_lower_precision_leaves_mhc_in_fp32(make_model, tokens, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert {p.dtype for name, p in half.named_parameters() if "_mhc" in name} == {torch.float32}
    assert {p.dtype for name, p in half.named_parameters() if "_mhc" not in name} == {torch.bfloat16}
    low = fn.cast(model.tree(), small_config(), torch.bfloat16)
    assert_trees_close(half.tree(), low, 0.0)
    plain, exact = (fn.forward(params, tokens, small_config()) for params in (low, double(model.tree())))
    assert_as_accurate(half(tokens).logits, plain, exact)
    half.save_pretrained(tmp_path / "half")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_replicas_of_data_parallel_compute_the_same(make_model, tokens):
    model = make_model()
    expected = model(tokens).logits
    assert torch.equal(torch.nn.DataParallel(model)(tokens).logits, expected)
    # What nn.DataParallel makes on each device: modules whose weights are plain tensors, none of them registered.
    modules = dict(model.named_modules())
    replicas = {name: module._replicate_for_data_parallel() for name, module in modules.items()}
    for name, module in modules.items():
        for key, child in module._modules.items():
            replicas[name]._modules[key] = None if child is None else replicas[f"{name}.{key}".lstrip(".")]
        for key, weight in module._parameters.items():
            setattr(replicas[name], key, None if weight is None else weight * 1)
    output = replicas[""](tokens, labels=tokens)
    assert torch.equal(output.logits, expected)
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_mhc_metrics_are_the_largest_entries_of_res(make_model, tokens):
    model = make_model()
    res = fn.backbone(model.tree(), tokens, small_config()).res
    expected = [tuple(pair) for pair in torch.stack([r.amax() for r in res]).view(-1, 2).tolist()]
    assert model.get_mhc_metrics(tokens) == expected
    first = model.model.layers[0].attn_mhc.get_connection_matrix().amax().item()
    assert model.get_mhc_metrics()[0][0] == first
    assert make_model(mhc_enabled=False).get_mhc_metrics() == [(1.0, 1.0)] * 2


def test_the_vocabulary_can_grow(make_model, tokens, tmp_path):
    model = make_model()
    before = model.double()(tokens).logits
    model.resize_token_embeddings(70)
    torch.testing.assert_close(model(tokens).logits[..., :61], before)
    logits = fn.forward(model.tree(), tokens, model.config.model_config)
    torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-12, atol=1e-12)
    model.save_pretrained(tmp_path)
    assert rlm_mhc.load_pretrained(tmp_path)[1].vocab_size == 70
    model.resize_token_embeddings(700, mean_resizing=False)
    assert 0.015 < model.get_input_embeddings().weight[70:].std() < 0.025


def test_wrong_calls_say_so(make_model, tokens):
    model = make_model()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="longer than max_seq_len=64"):
        model(torch.zeros(1, 65, dtype=torch.int64))
    embedded = model(inputs_embeds=model.get_input_embeddings()(tokens)).logits
    assert torch.equal(embedded, model(tokens).logits)
    assert model(tokens, use_cache=False).to_tuple()[-1] is not None
    assert isinstance(RLMModel(ModelConfig.preset("tiny")).config, RLMConfig)


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_no_token_is_refused(shape):
    model, tokens = RLMModel(small_config()), torch.zeros(shape, dtype=torch.int64)
    message = rf"\[{shape[0]}, {shape[1]}\]: expected at least one sequence and one token"
    for call in (
        lambda: model(tokens),
        lambda: model(inputs_embeds=torch.zeros(*shape, 32)),
        lambda: model.generate(tokens, max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match=message):
            call()
