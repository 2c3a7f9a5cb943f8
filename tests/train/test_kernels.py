import json
import re
import warnings
from pathlib import Path

import pytest
import torch

from rlm_mhc import TrainConfig
from rlm_mhc.kernels import selftest
from rlm_mhc.kernels.mixing import MIXING
from rlm_mhc.kernels.proven import PROVEN
from rlm_mhc.testing import small_config
from rlm_mhc.testing.kernel_results import source_digest
from rlm_mhc.train.kernels import pick_kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RESULTS = Path(__file__).parents[2] / "recipes" / "results"


def pick(device=CPU, model=None, **fields):
    return pick_kernels(model or small_config(), TrainConfig(mixed_precision="fp32", **fields), device)


@pytest.fixture
def gpu(monkeypatch):
    """What is asked of a GPU before a kernel is launched on it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setitem(PROVEN, (9, 0), "kernels_of_a_test.json")
    outcome = []
    monkeypatch.setattr(selftest, "self_test", lambda *arguments: outcome[0])
    return outcome


def test_auto_on_a_cpu_is_the_reference_and_says_why(capsys):
    assert pick().mixing is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "mixing       reference: the Triton kernels are for CUDA, and this is cpu"


def test_auto_takes_triton_where_it_is_proven_and_passes(gpu, capsys):
    gpu.append(None)
    assert pick(CUDA).mixing is MIXING
    out = capsys.readouterr().out
    assert re.search(r"Triton kernels: self-test passed in \d+ ms, compiled in \d+\.\d s;", out)
    assert "kernels_of_a_test.json" in out


def test_auto_stays_on_the_reference_where_no_result_shows_the_tests_passing(gpu, monkeypatch, capsys):
    monkeypatch.delitem(PROVEN, (9, 0))
    assert pick(CUDA).mixing is None
    assert "compute capability 9.0" in capsys.readouterr().out


def test_a_failed_self_test_is_never_silent(gpu, capsys):
    gpu.append("mix_pre: res is off by 1.0e+00 of its largest entry")
    with pytest.warns(UserWarning, match="fail their self-test, the reference mixes: mix_pre"):
        assert pick(CUDA).mixing is None
    assert "failed their self-test" in capsys.readouterr().out
    with pytest.raises(ValueError, match="fail their self-test: mix_pre"):
        pick(CUDA, kernels="triton")


def test_what_a_self_test_raises_counts_as_a_failure(gpu, monkeypatch):
    monkeypatch.setattr(selftest, "self_test", lambda *arguments: 1 / 0)
    with pytest.warns(UserWarning, match="ZeroDivisionError"):
        assert pick(CUDA).mixing is None


def test_auto_keeps_the_reference_for_a_model_that_triton_does_not_serve(gpu, capsys):
    assert pick(CUDA, small_config(mhc_preset="kron")).mixing is None
    assert "mhc_preset='kron'" in capsys.readouterr().out


def test_triton_by_name_refuses_what_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"run on CUDA.*TRITON_INTERPRET=1"):
        pick(kernels="triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(ValueError, match=r"7\.5: the Triton kernels need 8\.0"):
        pick(CUDA, kernels="triton")
    with pytest.raises(ValueError, match="do not serve this model"):
        pick(CUDA, small_config(mhc_preset="hc"), kernels="triton")
    with pytest.raises(ValueError, match="the model has none"):
        pick(model=small_config(mhc_enabled=False), kernels="triton")


def test_reference_by_name_and_without_mhc(capsys):
    assert pick(kernels="reference").mixing is None
    assert "reference: training.kernels=reference" in capsys.readouterr().out
    assert pick(model=small_config(mhc_enabled=False)).mixing is None
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there, the kernels are compiled")
def test_triton_by_name_in_the_interpreter_passes_its_self_test():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert pick(model=small_config(mhc_sinkhorn_iters=2), kernels="triton").mixing is MIXING


def test_what_is_called_proven_is_what_committed_results_show():
    assert not wrongly_proven(PROVEN, RESULTS)


def wrongly_proven(proven, folder):
    """Capabilities that are named but not shown, or shown but not named: what shows one are results of this very source
    whose tests pass, and none of it whose tests fail."""
    results = {file.name: json.loads(file.read_text()) for file in folder.glob("kernels_*.json")}
    own = {name: r for name, r in results.items() if r["capability"] and r["source"] == source_digest()}
    failed = {tuple(r["capability"]) for r in own.values() if r["tests"].get("failed")}
    shown = {(tuple(r["capability"]), name) for name, r in own.items() if r["tests_passed"]}
    named = [key for key, name in proven.items() if key in failed or (key, name) not in shown]
    return named + sorted({key for key, _ in shown} - failed - proven.keys())


def test_a_result_proves_its_own_source_on_its_own_kind_of_gpu(tmp_path):
    def write(name, **fields):
        passed = {"capability": [9, 0], "tests_passed": True, "tests": {"failed": 0}, "source": source_digest()}
        (tmp_path / name).write_text(json.dumps(passed | fields))

    write("kernels_a.json")
    assert not wrongly_proven({(9, 0): "kernels_a.json"}, tmp_path)
    assert wrongly_proven({}, tmp_path) == [(9, 0)]
    assert wrongly_proven({(8, 0): "kernels_a.json"}, tmp_path) == [(8, 0), (9, 0)]
    assert wrongly_proven({(9, 0): "kernels_b.json"}, tmp_path) == [(9, 0)]
    for fields in ({"source": "other"}, {"tests_passed": False}):
        write("kernels_a.json", **fields)
        assert wrongly_proven({(9, 0): "kernels_a.json"}, tmp_path) == [(9, 0)]
    write("kernels_a.json")
    write("kernels_b.json", tests_passed=False, tests={"failed": 1})
    assert wrongly_proven({(9, 0): "kernels_a.json"}, tmp_path) == [(9, 0)]
    assert not wrongly_proven({}, tmp_path)
