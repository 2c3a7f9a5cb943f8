import pytest
import torch

import rlm_mhc
from rlm_mhc import fn
from rlm_mhc.testing import small_config
from rlm_mhc.testing.models import with_wide_vectors


def test_a_fresh_model_passes_seven_checks(recipe):
    result = recipe("validate_model", "model.num_layers=2", "device=cpu")
    assert result.code == 0, result.out
    assert "7 of 7 checks passed" in result.out


def test_a_plain_transformer_passes(recipe):
    assert recipe("validate_model", "model.num_layers=2", "model.mhc_enabled=false", "device=cpu").code == 0


@pytest.mark.parametrize("change", [lambda params: params, with_wide_vectors], ids=["bf16", "mixed"])
def test_a_checkpoint_in_bf16_passes_with_norms_in_any_dtype(recipe, tmp_path, change):
    config = small_config()
    rlm_mhc.save_pretrained(tmp_path, change(fn.init(config, dtype=torch.bfloat16)), config)
    result = recipe("validate_model", f"checkpoint={tmp_path}", "device=cpu")
    assert result.code == 0, result.out


def test_a_broken_checkpoint_fails_with_a_code(recipe, tmp_path):
    config = small_config()
    params = fn.init(config)
    params.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    rlm_mhc.save_pretrained(tmp_path, params, config)
    result = recipe("validate_model", f"checkpoint={tmp_path}", "device=cpu")
    assert result.code == 1
    assert "FAILED" in result.out
    assert "logits are not finite" in result.out


def test_a_model_beside_a_checkpoint_is_an_error(recipe):
    assert "model of its own" in recipe("validate_model", "checkpoint=/nowhere", "model.num_layers=2").last_error


def test_a_missing_checkpoint_is_one_line(recipe):
    result = recipe("validate_model", "checkpoint=/nowhere")
    assert result.code == 2
    assert result.last_error == "error: /nowhere: no such checkpoint folder"
