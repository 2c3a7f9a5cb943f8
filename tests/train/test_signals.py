import signal

import torch

from rlm_mhc.parallel import ALONE
from rlm_mhc.train.signals import Request, Signals


def test_a_signal_that_comes_while_the_last_ones_are_read_is_not_lost(monkeypatch):
    signals, tensor = Signals(ALONE), torch.tensor

    def interrupted(*arguments, **options):
        said = tensor(*arguments, **options)
        signals.receive(signal.SIGUSR1)
        return said

    with monkeypatch.context() as patched:
        patched.setattr(torch, "tensor", interrupted)
        assert signals.agreed() == Request()
    assert signals.agreed() == Request(save=True)
    assert signals.agreed() == Request()
