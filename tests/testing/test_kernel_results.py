import json
import shutil
from pathlib import Path

import rlm_mhc.kernels
from rlm_mhc.testing import kernel_results
from rlm_mhc.testing.kernel_results import SAME, merged, source_digest


def test_a_part_is_added_to_what_was_measured_of_the_same_kernels(tmp_path):
    file = tmp_path / "result.json"
    earlier = dict.fromkeys(SAME, 1) | {"tests": {"passed": 3}, "sizes": ["a"]}
    file.write_text(json.dumps(earlier))
    later = dict.fromkeys(SAME, 1) | {"tests": {}, "sizes": []}
    assert merged(later, file) == earlier
    assert merged(later | {"tests": {"passed": 4}}, file)["tests"] == {"passed": 4}
    for key in SAME:
        assert merged(later | {key: 2}, file) == later | {key: 2}


def test_the_digest_is_that_of_what_runs_on_a_gpu_and_not_of_what_names_the_results(tmp_path, monkeypatch):
    folder = tmp_path / "kernels"
    shutil.copytree(Path(rlm_mhc.kernels.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    before = source_digest()
    monkeypatch.setattr(kernel_results.rlm_mhc.kernels, "__file__", str(folder / "__init__.py"))
    assert source_digest() == before
    (folder / "proven.py").write_text("PROVEN = {(9, 0): 'kernels_cuda_90_bf16.json'}")
    assert source_digest() == before
    with (folder / "mix_pre" / "triton.py").open("a") as file:
        file.write("# another")
    assert source_digest() != before
