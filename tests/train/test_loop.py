"""What the loop reads beside the step's own metrics."""

import torch

from rlm_mhc.train.loop import _peak_memory


def test_the_peak_of_gpu_memory_is_that_since_the_last_reading(monkeypatch):
    held = {"peak": 3 * 2**30, "resets": 0}

    def reset(device):
        held.update(peak=0, resets=held["resets"] + 1)

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    device = torch.device("cuda")
    assert [_peak_memory(device), _peak_memory(device)] == [{"gpu_peak_memory_gib": 3.0}, {"gpu_peak_memory_gib": 0.0}]
    assert held["resets"] == 2
    assert _peak_memory(torch.device("cpu")) == {}
