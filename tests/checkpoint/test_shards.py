import json
import subprocess
import sys
import textwrap

import pytest
import torch

from rlm_mhc.checkpoint.shards import stored_tensors, write_shards

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


MEASURED = """
    import json, resource, shutil, sys
    from pathlib import Path
    import torch
    from rlm_mhc import ModelConfig
    from rlm_mhc.checkpoint.shards import write_shards
    from rlm_mhc.convert import upcycle
    from rlm_mhc.convert.layouts import ARCHITECTURES, theirs_from_config, theirs_from_names
    from rlm_mhc.params import init
    from rlm_mhc.tree import named_leaves, size_bytes

    def convert(folder, shard_bytes, **shape):
        config = ModelConfig(num_heads=8, max_seq_len=64, mhc_enabled=False, **shape)
        kind, fields = theirs_from_config(config)
        shapes = named_leaves(init(config, device="meta"))
        names = theirs_from_names(shapes, ARCHITECTURES[kind])
        described = {names[name]: shape for name, shape in shapes.items()}
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(fields))
        ones = lambda names: {name: torch.ones(described[name].shape) for name in names}
        write_shards(folder, described, ones, 1)  # a file each, lest this take the memory that is measured
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        upcycle(folder, folder / "mhc", shard_bytes=shard_bytes)
        return size_bytes(shapes), 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

    root = Path(sys.argv[1])
    convert(root / "first", 1 << 20, hidden_dim=64, num_layers=1, vocab_size=50)  # what is loaded once
    size, growth = convert(root / "second", 40 << 20, hidden_dim=1024, num_layers=6, ffn_dim=2816, vocab_size=2048)
    print(size >> 20, growth >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
def test_converting_takes_the_memory_of_one_file_not_of_the_model(tmp_path):
    code = textwrap.dedent(MEASURED)
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    size, growth = map(int, run.stdout.split())
    assert size > 290
    # One file of 40 MiB, the largest tensor of 11 MiB as it lies in its file, and what the allocator does not return.
    assert growth < 80
