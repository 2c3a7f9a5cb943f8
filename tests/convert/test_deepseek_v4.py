import pytest
import torch
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from rlm_mhc import fn
from rlm_mhc.convert import mhc_from_deepseek_v4


def test_their_comb_is_our_res_transposed():
    n = 3
    weights = {"fn": torch.zeros(15, 6), "base": torch.zeros(15), "scale": torch.ones(3)}
    weights["base"][2 * n + 0 * n + 2] = 9.0  # their comb[0, 2]
    res = fn.mhc_mappings(mhc_from_deepseek_v4(weights), torch.randn(3, 2)).res
    assert res[2, 0] > 0.9
    assert res[0, 2] < 0.6
    untransposed = fn.MHCParams(weights["fn"].T, weights["scale"], weights["base"])
    assert fn.mhc_mappings(untransposed, torch.randn(3, 2)).res[0, 2] > 0.9


def test_what_is_converted_is_a_copy_in_its_dtype():
    weights = {"fn": torch.ones(8, 6).bfloat16(), "base": torch.ones(8), "scale": torch.ones(3)}
    params = mhc_from_deepseek_v4(weights)
    assert params.phi.dtype == torch.bfloat16
    for tensor in params:
        tensor.zero_()
        assert tensor.is_contiguous()
    assert all(weight.all() for weight in weights.values())


def test_a_whole_model_of_theirs_has_these_names():
    config = DeepseekV4Config(hc_mult=4, hidden_size=8)
    assert isinstance(mhc_from_deepseek_v4(v4.DeepseekV4HyperConnection(config).state_dict()), fn.MHCParams)
    assert isinstance(mhc_from_deepseek_v4(v4.DeepseekV4HyperHead(config).state_dict()), fn.MHCHead)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"other": torch.ones(1)}, "expected fn, base, scale or hc_fn"),
        ({"fn": torch.ones(7, 6)}, r"fn \[7, 6\]: expected \[8, n·c\] with n=2"),
        ({"fn": torch.ones(8, 5)}, r"fn \[8, 5\]"),
        ({"base": torch.ones(9)}, "base"),
        ({"scale": torch.ones(2)}, r"scale \[2\]: expected \[3\]"),
    ],
)
def test_other_names_and_shapes_are_refused(changes, words):
    weights = {"fn": torch.ones(8, 6), "base": torch.ones(8), "scale": torch.ones(3)} | changes
    with pytest.raises(ValueError, match=words):
        mhc_from_deepseek_v4(weights)
