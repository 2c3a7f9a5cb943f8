import json
import re
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from rlm_mhc import fn, load_pretrained, save_pretrained
from rlm_mhc.checkpoint import checkpoints, load_run, save_run
from rlm_mhc.testing import assert_trees_close, small_config
from rlm_mhc.testing.strategies import configs
from rlm_mhc.tree import named_leaves


@given(configs(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.integers(0, 2**32))
def test_weights_come_back_bit_equal_with_names_dtypes_and_metadata(config, dtype, seed):
    params = fn.init(config, seed=seed, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(folder, params, config)
        loaded, same = load_pretrained(folder)
        with safe_open(f"{folder}/model.safetensors", "pt") as file:
            assert file.metadata().keys() == {"format", "xxh3_128"}
            assert sorted(file.keys()) == sorted(named_leaves(params))
    assert same == config
    ours, theirs = named_leaves(params), named_leaves(loaded)
    assert list(ours) == list(theirs)
    for name, leaf in ours.items():
        assert leaf.dtype == theirs[name].dtype
        assert torch.equal(leaf, theirs[name])


@given(st.integers(0, 2**32), st.integers(1, 255))
def test_no_changed_byte_of_the_weights_goes_unnoticed(place, change):
    config = small_config()
    params = fn.init(config)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(folder, params, config)
        file = Path(folder, "model.safetensors")
        content = bytearray(file.read_bytes())
        content[place % len(content)] ^= change
        file.write_bytes(content)
        try:
            loaded, _ = load_pretrained(folder)
        except ValueError:
            return
        # It was in the metadata, or in the spaces behind them.
        assert_trees_close(loaded, params, 0.0)


@given(st.data(), st.integers(0, 2**32), st.sampled_from(["change", "cut", "fill"]))
def test_no_damage_to_a_file_of_a_run_goes_unnoticed(data, place, damage):
    config = small_config(num_layers=1)
    params = fn.init(config)
    with tempfile.TemporaryDirectory() as folder:
        path = save_run(Path(folder), params, config, fn.adamw_init(params), {"step": 1}, keep=1)
        assert checkpoints(Path(folder)) == [path]
        file = path / data.draw(st.sampled_from(sorted(p.name for p in path.iterdir())))
        content = bytearray(file.read_bytes())
        place %= len(content)
        before = bytes(content)
        if damage == "change":
            content[place] ^= 1 + data.draw(st.integers(0, 254))
        content[place:] = {"change": content[place:], "cut": b"", "fill": bytes(len(content) - place)}[damage]
        file.write_bytes(content)
        if content != before and not same_json(file.name, before, content):
            with pytest.raises(ValueError, match=re.escape(str(path))):
                load_run(path, fn.adamw_init)


def same_json(name, before, content):
    """White space between the values of a JSON object says nothing."""
    try:
        return name == "trainer_state.json" and json.loads(before) == json.loads(content)
    except ValueError:
        return False
