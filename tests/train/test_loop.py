"""What the loop reads beside the step's own metrics."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from rlm_mhc.train import loop
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


@pytest.mark.parametrize("error", [ValueError("no backend"), ImportError("none"), OSError("full")])
def test_a_picture_that_cannot_be_drawn_ends_no_training(error, tmp_path, monkeypatch, capsys):
    def broken(*args):
        raise error

    monkeypatch.setattr(loop, "draw_curves", broken)
    log = SimpleNamespace(records=[], write=lambda record: None)
    run, plan = SimpleNamespace(output_dir=tmp_path), SimpleNamespace(params=1)
    session = loop._Session(log, lambda record: None, run, plan)
    assert session.write({"step": 1})
    assert f"{type(error).__name__}: {error}" in capsys.readouterr().out


def test_the_backend_of_a_notebook_is_no_hindrance(tmp_path):
    code = (
        "from pathlib import Path; from rlm_mhc.train.curves import draw_curves; "
        "draw_curves([{'step': 1, 'train/loss': 2.0}], Path('a.png'))"
    )
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.nothing", "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "a.png").stat().st_size > 1000
