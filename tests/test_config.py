import dataclasses
from pathlib import Path

import pytest
import yaml

from rlm_mhc import ModelConfig, TrainConfig, fn
from rlm_mhc.train import RunConfig
from rlm_mhc.validation import build

CONFIGS = Path(__file__).parents[1] / "recipes" / "configs"
FILES = {"tiny": "tiny", "small_125m": "125m", "base_1b": "1b", "large_7b": "7b"}


@pytest.mark.parametrize(
    ("preset", "count"),
    [("tiny", 1_951_684), ("125m", 125_357_448), ("1b", 1_289_325_840), ("7b", 6_763_583_168)],
)
def test_presets_have_exactly_these_parameters(preset, count):
    assert fn.count(ModelConfig.preset(preset)) == count


def test_defaults_are_those_of_the_interface():
    config = ModelConfig()
    assert (config.head_dim, config.num_kv_heads, config.ffn_dim) == (128, 16, 5504)
    assert (config.mhc_flows, config.mhc_sinkhorn_iters, config.mhc_preset) == (4, 20, "paper")
    assert ModelConfig.preset("1b") == config


def test_replace_derives_sizes_anew_unless_they_were_chosen():
    assert ModelConfig().replace(hidden_dim=1024).ffn_dim == 2752
    assert ModelConfig(ffn_dim=100).replace(hidden_dim=1024).ffn_dim == 100


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(hidden_dim=0), ["hidden_dim=0", "at least 1"]),
        (dict(hidden_dim="wide"), ["hidden_dim='wide'", "whole number", "str"]),
        (dict(hidden_dim=2.5), ["hidden_dim=2.5", "whole number"]),
        (dict(hidden_dim=True), ["hidden_dim=True"]),
        (dict(hidden_dim=None), ["hidden_dim=None"]),
        (dict(num_heads=3), ["num_heads=3", "hidden_dim=2048", "divide"]),
        (dict(num_kv_heads=3), ["num_kv_heads=3", "num_heads=16"]),
        (dict(head_dim=5), ["head_dim=5", "even"]),
        (dict(mhc_flows=0), ["mhc_flows=0", "from 1 to 256"]),
        (dict(num_layers=10_001), ["num_layers=10001", "from 1 to 10000"]),
        (dict(norm_eps=float("nan")), ["norm_eps=nan"]),
        (dict(rope_theta=-1), ["rope_theta=-1", "above 0"]),
        (dict(mhc_preset="papper"), ["mhc_preset='papper'", "did you mean 'paper'"]),
        (dict(mhc_preset="hc", mhc_projection="sinkhorn"), ["mhc_projection='sinkhorn'", "'hc'", "unconstrained"]),
        (dict(mhc_projection="unconstrained"), ["mhc_preset='hc'"]),
        (dict(mhc_projection="kroneker"), ["did you mean 'kronecker'"]),
        (dict(mhc_preset="lite", mhc_flows=5), ["mhc_flows=5", "permutations needs from 1 to 4"]),
        (dict(mhc_projection="kronecker", mhc_flows=6), ["mhc_flows=6", "power of 2"]),
        (dict(tie_embeddings="yes"), ["tie_embeddings='yes'", "true or false"]),
    ],
)
def test_a_wrong_model_value_names_field_value_and_remedy(fields, words):
    with pytest.raises(ValueError) as caught:
        ModelConfig(**fields)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(optimizer={"lr": -1e-4}), ["optimizer.lr=-0.0001", "above 0"]),
        (dict(optimizer={"lrr": 1}), ["unknown key 'optimizer.lrr'", "did you mean 'lr'"]),
        (dict(optimizer={"betas": [0.9]}), ["optimizer.betas=[0.9]", "2 numbers"]),
        (dict(optimizer={"betas": [0.9, 1.5]}), ["betas"]),
        (dict(optimizer=3), ["optimizer=3"]),
        (dict(mixed_precision="fp8"), ["mixed_precision='fp8'", "bf16, fp16, fp32"]),
        (dict(remat="half"), ["remat='half'", "none, mhc, full"]),
        (dict(remat="mhc", gradient_checkpointing=True), ["remat='full'", "leave one out"]),
        (dict(batch_size=0), ["batch_size=0"]),
    ],
)
def test_a_wrong_training_value_names_field_value_and_remedy(fields, words):
    with pytest.raises(ValueError) as caught:
        TrainConfig(**fields)
    assert all(word in str(caught.value) for word in words), caught.value


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="did you mean 'tiny'"):
        ModelConfig.preset("tinny")


@pytest.mark.parametrize(("file", "preset"), FILES.items())
def test_model_files_of_the_recipes_equal_the_presets(file, preset):
    fields = yaml.safe_load((CONFIGS / "model" / f"{file}.yaml").read_text())
    fields["norm_eps"] = float(fields["norm_eps"])
    assert ModelConfig(**fields) == ModelConfig.preset(preset)
    assert set(fields) == {f.name for f in dataclasses.fields(ModelConfig)}


def test_defaults_of_the_recipe_equal_those_of_the_config():
    fields = yaml.safe_load((CONFIGS / "pretrain_1b.yaml").read_text())
    assert fields.pop("defaults")[0] == {"model": "base_1b"}
    fields.pop("hydra")
    for key in ("lr", "eps"):  # YAML 1.1 reads 1e-4 as text; Hydra does not
        fields["training"]["optimizer"][key] = float(fields["training"]["optimizer"][key])
    assert build(RunConfig, fields) == RunConfig()
    assert fields.keys() == {f.name for f in dataclasses.fields(RunConfig)} - {"model"}
    assert fields["training"].keys() == {f.name for f in dataclasses.fields(TrainConfig)}
