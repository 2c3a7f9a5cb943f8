import json

import pytest
import torch

from rlm_mhc.kernels import choose
from rlm_mhc.kernels.mix_pre import Settings

SIZES = dict(streams=2, width=16, early_pre=False, settings=Settings(1, 1e-6, 0.0), dtype=torch.float32)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def measured(monkeypatch):
    """What is measured, without measuring."""
    calls = []
    monkeypatch.setattr(choose, "_measure", lambda *arguments: calls.append(arguments) or choose.Times(1.0, 2.0))
    return calls


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("early_pre", [False, True])
def test_both_are_run_forward_and_backward_and_timed(device, cache, monkeypatch, early_pre):
    monkeypatch.setattr(choose, "TOKENS", 5)
    monkeypatch.setattr(choose, "SECONDS", 1e-3)
    times = choose.mixing_times(**SIZES | {"early_pre": early_pre}, device=device)
    assert times.fused > 0
    assert times.reference > 0
    assert json.loads(next(cache.iterdir()).read_text()) == times._asdict()


def test_a_size_is_measured_once_per_machine_and_version(cache, measured, monkeypatch):
    cpu = torch.device("cpu")
    assert choose.mixing_times(**SIZES, device=cpu) == choose.mixing_times(**SIZES, device=cpu) == (1.0, 2.0)
    assert len(measured) == 1
    for other in ({"streams": 3}, {"width": 32}, {"early_pre": True}, {"dtype": torch.bfloat16}):
        choose.mixing_times(**SIZES | other, device=cpu)
    choose.mixing_times(**SIZES | {"settings": Settings(2, 1e-6, 0.0)}, device=cpu)
    assert len(measured) == 6
    monkeypatch.setattr(choose.importlib.metadata, "version", lambda name: "99")
    choose.mixing_times(**SIZES, device=cpu)
    assert len(measured) == 7


@pytest.mark.parametrize("content", ["", "{", "[]", '{"fused": 1.0}', "\xff"])
def test_a_damaged_cache_is_measured_again(cache, measured, content):
    cpu = torch.device("cpu")
    choose.mixing_times(**SIZES, device=cpu)
    (file,) = cache.iterdir()
    file.write_text(content, encoding="latin-1")
    assert choose.mixing_times(**SIZES, device=cpu) == (1.0, 2.0)
    assert len(measured) == 2
    assert json.loads(file.read_text()) == {"fused": 1.0, "reference": 2.0}


def test_a_cache_that_cannot_be_written_is_no_error(measured, monkeypatch):
    monkeypatch.setattr(choose, "cache_folder", lambda: choose.Path("/proc/no such folder"))
    assert choose.mixing_times(**SIZES, device=torch.device("cpu")) == (1.0, 2.0)
