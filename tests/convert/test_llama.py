"""Models of transformers upcycled: the same logits and loss, and hyper-connections that learn."""

import dataclasses
import json

import pytest
import torch

import rlm_mhc
from rlm_mhc import TrainConfig, fn
from rlm_mhc.convert import from_llama, upcycle
from rlm_mhc.model import RLMModel
from rlm_mhc.program import make_train_step
from rlm_mhc.program.state import resume_train_state
from rlm_mhc.testing import assert_as_accurate, assert_trees_close, random_batch
from rlm_mhc.tree import named_leaves, tree_leaves

KINDS = ["llama", "mistral", "qwen2", "qwen3"]
TOKENS = torch.randint(101, (3, 33), generator=torch.Generator().manual_seed(0))


def logits_of(model):
    with torch.no_grad():
        return model(TOKENS).logits


def parts(tensor, n):
    """pre, post and res of a weight of a sub-layer."""
    return tensor.split([1, 1, 1] if len(tensor) == 3 else [n, n, n * n], -1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_sources(theirs, same_logits, tmp_path, kind, tied):
    model = theirs(kind, tie_word_embeddings=tied)
    assert logits_of(model).std() > 0.5
    params, config = from_llama(model)
    assert config.mhc_enabled
    assert config.tie_embeddings == tied
    same_logits(fn.forward(params, TOKENS, config), model, TOKENS)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    from_folder, same = from_llama(tmp_path / "theirs")
    assert same == config
    assert_trees_close(from_folder, params, 0.0)
    upcycle(tmp_path / "theirs", tmp_path / "ours", shard_bytes=100_000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    loaded, same = rlm_mhc.load_pretrained(tmp_path / "ours")
    assert same == config
    assert_trees_close(loaded, params, 0.0)
    ours = RLMModel.from_pretrained(tmp_path / "ours").eval()
    same_logits(logits_of(ours), model, TOKENS)


@pytest.mark.parametrize(
    "choices",
    [{"mhc_flows": n} for n in (2, 3, 5)]
    + [{"mhc_preset": name} for name in ("identity", "hc", "lite", "kron", "orthostochastic", "single_pass")]
    + [{"mhc_preset": "deepseek_v4", "mhc_projection": "kronecker"}, {"mhc_enabled": False}],
    ids=str,
)
def test_other_hyper_connections_have_the_sources_logits_too(theirs, same_logits, choices):
    model = theirs()
    params, config = from_llama(model, **choices)
    same_logits(fn.forward(params, TOKENS, config), model, TOKENS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_has_the_sources_loss_and_every_gate_opens(theirs, kind):
    model = theirs(kind)
    params, config = from_llama(model)
    batch = random_batch(config, 2, 32)

    def loss():
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(model(batch.tokens).logits.flatten(0, 1), batch.targets.flatten())

    plain, exact = loss(), (model.double(), loss())[1]
    training = TrainConfig(
        batch_size=2,
        gradient_accumulation_steps=1,
        mixed_precision="fp32",
        compile=False,
        optimizer={"lr": 1e-3},
        scheduler={"warmup_steps": 0},
    )
    state = resume_train_state(params, fn.adamw_init(params), 0, ())
    step = make_train_step(config, training)
    before = {name: leaf.clone() for name, leaf in named_leaves(params).items()}
    for count in range(8):
        state, metrics = step(state, batch)
        if count == 0:
            assert_as_accurate(metrics["loss"], plain, exact)
    assert metrics["loss"] < exact - 0.1
    moved = {name: (leaf - before[name]).abs() for name, leaf in named_leaves(state.params).items()}
    n, sites = config.mhc_flows, [name for name in moved if "mhc" in name]
    for name in sites:
        pre, post, res = (part.max() for part in parts(moved[name], n))
        outer = name.startswith(("layers.0.attn", f"layers.{config.num_layers - 1}.mlp"))
        # The first res mixes equal streams and the last one's streams are averaged: neither has a say.
        assert min(pre, post) > 1e-3, name
        assert outer or res > 1e-3, name


def test_every_gate_receives_a_gradient_at_once(theirs):
    params, config = from_llama(theirs(num_hidden_layers=3))
    batch = random_batch(config, 4, 32)
    grads = {k: g for k, g in named_leaves(torch.func.grad(fn.loss)(params, batch, config)).items() if "mhc" in k}
    assert len(grads) == 18
    for name, gradient in grads.items():
        outer = name.startswith(("layers.0.attn", "layers.2.mlp"))
        largest = [part.abs().max() for part in parts(gradient, config.mhc_flows)]
        if not name.endswith("phi"):
            # Adam's eps is 1e-8: a bias beyond it moves as fast as any weight.
            assert all(size > 1e-7 for size in largest[: 2 if outer else 3]), name
        assert all(size > 0 for size in largest), name


def test_streams_differ_though_their_mean_is_the_plain_residual(theirs):
    params, config = from_llama(theirs())
    streams = fn.backbone(params, TOKENS, config).hidden.x
    deviation = streams - streams.mean(-2, keepdim=True)
    assert deviation.square().mean().sqrt() > 0.05 * streams.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_keep_their_dtype_and_hyper_connections_are_wide(theirs, tmp_path, dtype):
    model = theirs().to(dtype)
    model.save_pretrained(tmp_path / "theirs")
    upcycle(tmp_path / "theirs", tmp_path / "ours")
    named = named_leaves(rlm_mhc.load_pretrained(tmp_path / "ours")[0])
    wide = torch.promote_types(dtype, torch.float32)
    assert {leaf.dtype for name, leaf in named.items() if "mhc" in name} == {wide}
    assert {leaf.dtype for name, leaf in named.items() if "mhc" not in name} == {dtype}
    assert torch.equal(named["layers.1.mlp.up_proj.weight"], model.state_dict()["model.layers.1.mlp.up_proj.weight"])
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_what_is_returned_is_a_copy_and_the_seed_counts(theirs):
    model = theirs()
    first, config = from_llama(model, seed=1)
    second, _ = from_llama(model, seed=2)
    assert not torch.equal(first.layers[0].attn_mhc.phi, second.layers[0].attn_mhc.phi)
    expected = logits_of(model)
    for leaf in tree_leaves(first):
        leaf.zero_()
    assert torch.equal(logits_of(model), expected)
    assert dataclasses.asdict(config)["rope_theta"] == 500.0


def test_tokenizer_ids_and_generation_config_come_along(theirs, tmp_path):
    theirs().save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    (tmp_path / "theirs" / "notes.txt").write_text("")
    upcycle(tmp_path / "theirs", tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["eos_token_id"] == 2
    names = {file.name for file in (tmp_path / "ours").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "config.yaml", "modeling_rlm_mhc.py"} <= names
    assert "notes.txt" not in names
    model = RLMModel.from_pretrained(tmp_path / "ours")
    assert model.generation_config.eos_token_id == 2


def test_a_folder_in_use_is_left_alone(theirs, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        upcycle(theirs(), tmp_path / "ours")
    assert [file.name for file in tmp_path.rglob("*")] == ["ours", "mine"]
