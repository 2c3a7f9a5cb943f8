import json
import os
import subprocess
import sys

import pytest
import torch

from rlm_mhc import ModelConfig, fn
from rlm_mhc.checkpoint.shards import stored_tensors, write_shards
from rlm_mhc.convert.fields import theirs_from_config
from rlm_mhc.convert.layouts import ARCHITECTURES, theirs_from_names
from rlm_mhc.tree import named_leaves, size_bytes

NAMED = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(40), "c": torch.zeros(3, dtype=torch.bfloat16)}


def described(named):
    return {name: tensor.to("meta") for name, tensor in named.items()}


def read(names):
    return {name: NAMED[name] for name in names}


@pytest.mark.parametrize(
    ("limit", "files"), [(1 << 20, [["a", "b", "c"]]), (166, [["a"], ["b", "c"]]), (30, ["a", "b", "c"])]
)
def test_files_hold_at_most_what_they_may_and_a_larger_tensor_is_alone(tmp_path, limit, files):
    write_shards(tmp_path, described(NAMED), read, limit)
    names = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    if len(files) == 1:
        assert names == ["model.safetensors"]
        assert not (tmp_path / "model.safetensors.index.json").exists()
    else:
        assert names == [f"model-0000{i}-of-0000{len(files)}.safetensors" for i in range(1, len(files) + 1)]
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 24 + 160 + 6
        assert index["weight_map"] == {name: names[i] for i, held in enumerate(files) for name in held}
    shapes, read_some = stored_tensors(tmp_path)
    assert {name: (x.shape, x.dtype, x.is_meta) for name, x in shapes.items()} == {
        name: (x.shape, x.dtype, True) for name, x in NAMED.items()
    }
    assert list(found := read_some(["c", "a"])) == ["c", "a"]
    assert all(torch.equal(found[name], NAMED[name]) for name in found)


def test_a_changed_byte_is_found_when_its_tensor_is_read(tmp_path):
    write_shards(tmp_path, described(NAMED), read, 166)
    file = tmp_path / "model-00002-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    _, read_some = stored_tensors(tmp_path)
    read_some(["a"])
    with pytest.raises(ValueError, match=rf"{file.name}: damaged"):
        read_some(["b", "c"])


def test_an_index_that_says_something_else_is_refused(tmp_path):
    write_shards(tmp_path, described(NAMED), read, 166)
    index = tmp_path / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"]["d"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors: does not fit .*; missing d"):
        stored_tensors(tmp_path)


def llama_folder(folder, **shape):
    """A Llama of ones, a file for each weight; returns its bytes."""
    config = ModelConfig(num_heads=8, max_seq_len=64, mhc_enabled=False, **shape)
    kind, fields = theirs_from_config(config)
    shapes = named_leaves(fn.init(config, device="meta"))
    theirs = {name: shapes[our] for our, name in theirs_from_names(shapes, ARCHITECTURES[kind]).items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    write_shards(folder, theirs, lambda names: {name: torch.ones(theirs[name].shape) for name in names}, 1)
    return size_bytes(shapes)


# The first conversion loads what is loaded once. `ru_maxrss` would begin with what the parent had.
MEASURED = """
from pathlib import Path
from rlm_mhc.convert import upcycle

def peak():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

upcycle("small", "small_mhc")
before = peak()
upcycle("large", "large_mhc", shard_bytes=40 << 20)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_converting_takes_the_memory_of_one_file_not_of_the_model(tmp_path):
    llama_folder(tmp_path / "small", hidden_dim=64, num_layers=1, vocab_size=50)
    size = llama_folder(tmp_path / "large", hidden_dim=1024, num_layers=6, ffn_dim=2816, vocab_size=2048)
    assert size > 290 << 20
    path = os.pathsep.join(entry for entry in sys.path if entry)
    run = [sys.executable, "-c", MEASURED]
    done = subprocess.run(
        run, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    # One file of 40 MiB, the largest tensor of 11 MiB as it lies in its file, and what the allocator does not return.
    assert int(done.stdout) < 100 << 20
