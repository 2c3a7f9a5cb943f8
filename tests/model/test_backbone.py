"""One folder serves the backbone, the language model and the classifier."""

import dataclasses

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import rlm_mhc
from rlm_mhc import fn
from rlm_mhc.model import RLMBackbone, RLMConfig, RLMForSequenceClassification, RLMModel
from rlm_mhc.testing import small_config

CLASSES = {
    AutoModel: RLMBackbone,
    AutoModelForCausalLM: RLMModel,
    AutoModelForSequenceClassification: RLMForSequenceClassification,
}
variants = pytest.mark.parametrize(
    "changes", [{}, {"mhc_preset": "deepseek_v4", "tie_embeddings": False}, {"mhc_preset": "single_pass"}], ids=str
)


def stored_names(folder):
    names = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            names += content.keys()
    return set(names)


@variants
def test_the_head_of_the_backbones_state_are_the_logits(make_model, tokens, changes):
    model = make_model(**changes)
    output = model(tokens, output_hidden_states=True)
    assert model.base_model is model.get_decoder() is model.model
    for backbone in (model.base_model, model.get_decoder()):
        state = backbone(input_ids=tokens).last_hidden_state
        assert torch.equal(model.lm_head(state), output.logits)
    assert torch.equal(output.hidden_states[-1], state)
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(tokens))


@pytest.mark.parametrize("auto", CLASSES, ids=lambda auto: auto.__name__)
@pytest.mark.parametrize("shard", ["50GB", "30KB"])
def test_every_class_reads_what_any_class_wrote(make_model, tokens, tmp_path, auto, shard):
    lm = make_model(mhc_preset="deepseek_v4", tie_embeddings=False)
    lm.save_pretrained(tmp_path / "lm", max_shard_size=shard)
    model = auto.from_pretrained(tmp_path / "lm", num_labels=2)
    assert type(model) is CLASSES[auto]
    expected = lm.model(tokens).last_hidden_state
    assert torch.equal(model.base_model(tokens).last_hidden_state, expected)
    model.save_pretrained(tmp_path / "again", max_shard_size=shard)
    heads = {"lm_head.weight", "score.weight"}
    names = stored_names(tmp_path / "again")
    assert names - heads == set(fn.names(lm.config.model_config)) - heads
    for other in (RLMBackbone, RLMForSequenceClassification, type(model)):
        loaded = other.from_pretrained(tmp_path / "again")
        assert torch.equal(loaded.base_model(tokens).last_hidden_state, expected)
    if auto is AutoModelForCausalLM:
        params, config = rlm_mhc.load_pretrained(tmp_path / "again")
        assert torch.equal(fn.forward(params, tokens, config), lm(tokens).logits)


def test_a_classifiers_tied_folder_is_a_language_model_too(make_model, tokens, tmp_path):
    lm = make_model(tie_embeddings=True)
    lm.save_pretrained(tmp_path / "lm")
    RLMForSequenceClassification.from_pretrained(tmp_path / "lm").save_pretrained(tmp_path / "classifier")
    assert "score.weight" in stored_names(tmp_path / "classifier")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "classifier", output_loading_info=True)
    assert info["unexpected_keys"] == {"score.weight"}
    assert torch.equal(loaded(tokens).logits, lm(tokens).logits)


@pytest.mark.parametrize("kind", CLASSES.values(), ids=lambda kind: kind.__name__)
def test_a_folder_of_fn_is_read_by_every_class(tokens, tmp_path, kind):
    config = small_config()
    params = fn.init(config, seed=3)
    rlm_mhc.save_pretrained(tmp_path, params, config)
    own = kind.from_pretrained(tmp_path).base_model.tree()
    assert torch.equal(
        fn.head(own, fn.backbone(own, tokens, config).hidden, config), fn.forward(params, tokens, config)
    )


def test_state_dicts_load_with_the_names_on_disk_and_with_those_of_the_module(make_model, tokens, tmp_path):
    lm, other = make_model(), RLMModel(small_config()).eval()
    lm.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    result = other.load_state_dict(on_disk, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["lm_head.weight"], [])
    assert torch.equal(other(tokens).logits, lm(tokens).logits)
    assert RLMModel(small_config()).load_state_dict(lm.state_dict())
    assert RLMBackbone(small_config()).load_state_dict(on_disk)
    wrapped = torch.nn.ModuleDict({"inner": RLMModel(small_config()).eval()})
    wrapped.load_state_dict({f"inner.{name}": weight for name, weight in on_disk.items()}, strict=False)
    assert torch.equal(wrapped["inner"](tokens).logits, lm(tokens).logits)


@pytest.mark.parametrize("shard", ["50GB", "30KB"])
def test_names_with_the_prefix_of_the_module_are_read_from_disk(make_model, tokens, tmp_path, shard):
    lm = make_model()
    lm.save_pretrained(tmp_path, save_original_format=False, max_shard_size=shard)
    assert "model.norm.weight" in stored_names(tmp_path)
    for kind in CLASSES.values():
        state = kind.from_pretrained(tmp_path).base_model(tokens).last_hidden_state
        assert torch.equal(state, lm.model(tokens).last_hidden_state)
    params, config = rlm_mhc.load_pretrained(tmp_path)
    assert torch.equal(fn.forward(params, tokens, config), lm(tokens).logits)


@pytest.mark.parametrize("kind", CLASSES.values(), ids=lambda kind: kind.__name__)
def test_weights_that_are_in_no_file_get_their_initial_values(kind):
    config = RLMConfig(**dataclasses.asdict(small_config(mhc_preset="deepseek_v4", qkv_bias=True, qk_norm=True)))
    torch.manual_seed(7)
    expected = kind(config).state_dict()
    torch.manual_seed(7)
    loaded = kind.from_pretrained(None, config=config, state_dict={}, ignore_mismatched_sizes=True).state_dict()
    assert loaded.keys() == expected.keys()
    # A score's initial values follow the generator, which layers on the meta device do not advance.
    assert all(torch.equal(loaded[name], weight) for name, weight in expected.items() if name != "score.weight")


def test_the_classifier_scores_the_last_token_that_is_no_padding(make_model, tokens, tmp_path):
    make_model().save_pretrained(tmp_path)
    model, info = RLMForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, pad_token_id=0, output_loading_info=True
    )
    assert info["missing_keys"] == {"score.weight"}
    assert 0.01 < model.score.weight.std() < 0.03
    tokens = tokens.clamp(min=1)
    tokens[0, 6:] = 0
    scores = model.score(model.model(tokens).last_hidden_state)
    assert torch.equal(model(tokens).logits, torch.stack([scores[0, 5], scores[1, 8]]))
    output = model(tokens, labels=torch.tensor([2, 0]))
    output.loss.backward()
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, torch.tensor([2, 0])))
    assert all(p.grad is not None for p in model.parameters())
    model.save_pretrained(tmp_path / "trained")
    again, info = RLMForSequenceClassification.from_pretrained(tmp_path / "trained", output_loading_info=True)
    assert not any(info.values())
    assert again.config.num_labels == 3
    assert torch.equal(again.eval()(tokens).logits, model.eval()(tokens).logits)


def test_only_the_heads_may_be_missing(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "config.yaml").unlink()
    config = RLMConfig.from_pretrained(tmp_path, num_layers=3)
    config.save_pretrained(tmp_path)
    for kind in CLASSES.values():
        with pytest.raises(ValueError, match=r"missing layers\.2\.attn_mhc\.phi.*, unexpected nothing"):
            kind.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"missing (model\.)?layers\.2\..*, unexpected nothing"):
            kind.from_pretrained(None, config=config, state_dict=model.model.state_dict())


def test_generation_with_early_exit_gives_the_tokens_of_greedy_search(make_model, tokens):
    model = make_model()
    options = dict(max_new_tokens=8, do_sample=False)
    early = model.generate(tokens[:1], assistant_early_exit=1, **options)
    assert torch.equal(early, model.generate(tokens[:1], **options))
    model.config.num_hidden_layers = 1
    assert torch.equal(model(tokens).logits, fn.forward(model.tree(), tokens, small_config()))
    shallow = small_config(num_layers=1)
    assert torch.equal(model(tokens).logits, fn.forward(model.tree(), tokens, shallow))
