import re
import warnings

import pytest
import torch

from rlm_mhc import TrainConfig
from rlm_mhc.kernels import choose, selftest
from rlm_mhc.kernels.mixing import FUSED
from rlm_mhc.testing import small_config
from rlm_mhc.train.kernels import pick_kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def pick(device=CPU, model=None, **fields):
    return pick_kernels(model or small_config(), TrainConfig(mixed_precision="fp32", **fields), device)


@pytest.fixture
def gpu(monkeypatch):
    """What is asked of a GPU before a kernel is launched on it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(choose, "mixing_times", lambda *arguments: choose.Times(1.0, 2.0))
    outcome = []
    monkeypatch.setattr(selftest, "self_test", lambda *arguments: outcome[0])
    return outcome


def test_auto_on_a_cpu_is_the_reference_and_says_why(capsys):
    assert pick().block is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "mixing       reference: the Triton kernels are for CUDA, and this is cpu"


@pytest.mark.parametrize(("fused", "reference", "taken"), [(1.5, 3.0, FUSED), (3.0, 1.5, None)])
def test_auto_takes_the_faster_and_says_by_how_much(gpu, monkeypatch, capsys, fused, reference, taken):
    gpu.append(None)
    monkeypatch.setattr(choose, "mixing_times", lambda *arguments: choose.Times(fused, reference))
    assert pick(CUDA).block is taken
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"mixing       {'Triton kernels' if taken else 'reference'}: ")
    assert f"{fused:.2f} ms a sub-layer, the compiled reference {reference:.2f} ms ({reference / fused:.2f}×)" in line
    assert re.search(r"self-test passed in \d+ ms, compiled in \d+\.\d s", line)


def test_every_rank_takes_what_the_first_one_measured_unless_a_self_test_fails_on_one(gpu):
    gpu.append(None)
    slow, fast = (None, choose.Times(3.0, 1.0), ""), (None, choose.Times(1.0, 3.0), "")
    config, training = small_config(), TrainConfig(mixed_precision="fp32")
    assert pick_kernels(config, training, CUDA, lambda value: [fast, slow]).block is FUSED
    assert pick_kernels(config, training, CUDA, lambda value: [slow, fast]).block is None
    with pytest.warns(UserWarning, match="res is off"):
        assert pick_kernels(config, training, CUDA, lambda value: [fast, ("res is off", None, "")]).block is None


def test_kernels_that_cannot_be_timed_are_not_taken(gpu, monkeypatch):
    gpu.append(None)
    monkeypatch.setattr(choose, "mixing_times", lambda *arguments: 1 / 0)
    with pytest.warns(UserWarning, match="could not be timed, the reference mixes: ZeroDivisionError"):
        assert pick(CUDA).block is None


def test_a_failed_self_test_is_never_silent(gpu, capsys):
    gpu.append("mix_pre: res is off by 1.0e+00 of its largest entry")
    with pytest.warns(UserWarning, match="fail their self-test, the reference mixes: mix_pre"):
        assert pick(CUDA).block is None
    assert "failed their self-test" in capsys.readouterr().out
    with pytest.raises(ValueError, match="fail their self-test: mix_pre"):
        pick(CUDA, kernels="triton")


def test_what_a_self_test_raises_counts_as_a_failure(gpu, monkeypatch):
    monkeypatch.setattr(selftest, "self_test", lambda *arguments: 1 / 0)
    with pytest.warns(UserWarning, match="ZeroDivisionError"):
        assert pick(CUDA).block is None


def test_auto_keeps_the_reference_for_a_model_that_triton_does_not_serve(gpu, capsys):
    assert pick(CUDA, small_config(mhc_preset="kron")).block is None
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
    assert pick(kernels="reference").block is None
    assert "reference: training.kernels=reference" in capsys.readouterr().out
    assert pick(model=small_config(mhc_enabled=False)).block is None
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there, the kernels are compiled")
def test_triton_by_name_in_the_interpreter_passes_its_self_test():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert pick(model=small_config(mhc_sinkhorn_iters=2), kernels="triton").block is FUSED
