import json
import stat

import pytest
import torch
from safetensors import safe_open

import rlm_mhc
from rlm_mhc import fn
from rlm_mhc.testing import assert_trees_close, small_config
from rlm_mhc.testing.models import with_wide_vectors
from rlm_mhc.tree import named_leaves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_bit_equal(tmp_path, dtype, tied):
    config = small_config(tie_embeddings=tied)
    params = fn.init(config, dtype=dtype)
    rlm_mhc.save_pretrained(tmp_path, params, config)
    loaded, same = rlm_mhc.load_pretrained(tmp_path)
    assert same == config
    assert_trees_close(loaded, params, 0.0)
    assert [w.dtype for w in named_leaves(loaded).values()] == [w.dtype for w in named_leaves(params).values()]


@pytest.mark.parametrize("matrices", [torch.bfloat16, torch.float16, torch.float64])
def test_a_folder_is_labelled_by_its_matrices_and_keeps_every_dtype(tmp_path, matrices):
    config = small_config(qkv_bias=True)
    params = with_wide_vectors(fn.init(config, dtype=matrices))
    rlm_mhc.save_pretrained(tmp_path, params, config)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(matrices).removeprefix("torch.")
    loaded, _ = rlm_mhc.load_pretrained(tmp_path)
    assert [w.dtype for w in named_leaves(loaded).values()] == [w.dtype for w in named_leaves(params).values()]
    assert_trees_close(loaded, params, 0.0)


def test_files_have_the_dotted_names_and_ordinary_permissions(tmp_path):
    config = small_config()
    rlm_mhc.save_pretrained(tmp_path / "new" / "folder", fn.init(config), config)
    with safe_open(tmp_path / "new" / "folder" / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(fn.names(config))
        metadata = file.metadata()
        assert metadata.pop("xxh3_128")
        assert metadata == {"format": "pt"}
    (tmp_path / "plain").touch()
    mode = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    files = list((tmp_path / "new" / "folder").iterdir())
    assert sorted(f.name for f in files) == [
        "config.json",
        "config.yaml",
        "model.safetensors",
        "modeling_rlm_mhc.py",
    ]
    assert {stat.S_IMODE(f.stat().st_mode) for f in files} == {mode}


def test_a_tree_of_another_config_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"missing layers\.2\.attn_mhc\.phi"):
        rlm_mhc.save_pretrained(tmp_path, fn.init(small_config()), small_config(num_layers=3))
    assert not (tmp_path / "model.safetensors").exists()


def test_missing_damaged_and_foreign_files_are_named(tmp_path):
    config = small_config()
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        rlm_mhc.load_pretrained(tmp_path / "nope")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        rlm_mhc.load_pretrained(tmp_path)
    rlm_mhc.save_pretrained(tmp_path, fn.init(config), config)
    weights, description = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, fields = weights.read_bytes(), json.loads(description.read_text())
    weights.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        rlm_mhc.load_pretrained(tmp_path)
    weights.write_bytes(whole)
    description.write_text(json.dumps(fields | {"ffn_dim": 50}))
    with pytest.raises(ValueError, match="do not say the same: ffn_dim=50 and ffn_dim=48"):
        rlm_mhc.load_pretrained(tmp_path)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate_proj\.weight has \(48, 32\), not \(50, 32\)"):
        rlm_mhc.load_pretrained(tmp_path)
    description.write_text(json.dumps(fields | {"hidden_dimm": 50}))
    with pytest.raises(ValueError, match="did you mean 'hidden_dim'"):
        rlm_mhc.load_pretrained(tmp_path)
    description.write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="not a model of this library"):
        rlm_mhc.load_pretrained(tmp_path)
    description.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        rlm_mhc.load_pretrained(tmp_path)
