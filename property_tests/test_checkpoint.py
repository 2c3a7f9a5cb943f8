import tempfile

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from rlm_mhc import fn, load_pretrained, save_pretrained
from rlm_mhc.testing.strategies import configs
from rlm_mhc.tree import named_leaves


@given(configs(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.integers(0, 2**32))
def test_weights_come_back_bit_equal_with_names_dtypes_and_metadata(config, dtype, seed):
    params = fn.init(config, seed=seed, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(folder, params, config)
        loaded, same = load_pretrained(folder)
        with safe_open(f"{folder}/model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert sorted(file.keys()) == sorted(named_leaves(params))
    assert same == config
    ours, theirs = named_leaves(params), named_leaves(loaded)
    assert list(ours) == list(theirs)
    for name, leaf in ours.items():
        assert leaf.dtype == theirs[name].dtype
        assert torch.equal(leaf, theirs[name])
