import os
import signal
import time
from contextlib import suppress

import pytest
import torch

from rlm_mhc.parallel import ALONE
from rlm_mhc.train.signals import REPEAT_SECONDS, Request, Signals, watch_signals


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


@pytest.fixture
def ended(monkeypatch):
    """The codes that the process would have ended with, and a clock to set."""
    codes, clock = [], [100.0]
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    return codes, clock


def test_repeats_within_seconds_are_one_request_and_a_later_one_ends_at_once(ended, capfd):
    codes, clock = ended
    signals = Signals(ALONE)
    for _ in range(3):
        signals.receive(signal.SIGTERM)
        signals.receive(signal.SIGINT)
        clock[0] += REPEAT_SECONDS / 4
    assert signals.agreed() == Request(stop=True)
    assert codes == []
    assert capfd.readouterr().err == "\nSIGTERM: finishing the step, then saving; once more after 5 s ends it now\n"
    clock[0] = 100.0 + REPEAT_SECONDS + 0.1
    signals.receive(signal.SIGINT)
    assert codes == [128 + signal.SIGINT]


def test_a_rank_that_stops_for_another_one_takes_a_signal_of_its_own_as_the_same_request(ended):
    codes, _ = ended
    signals = Signals(ALONE)
    signals.vote.exchange = lambda asked: torch.tensor([1, 0])
    assert signals.agreed() == Request(stop=True)
    signals.receive(signal.SIGTERM)
    assert codes == []


def test_handlers_are_put_back_unless_a_stop_was_asked_for(default_signals):
    with watch_signals(ALONE):
        assert all(signal.getsignal(number) != handler for number, handler in default_signals.items())
    assert {number: signal.getsignal(number) for number in default_signals} == default_signals
    with watch_signals(ALONE) as signals:
        signal.raise_signal(signal.SIGHUP)
        assert signals.agreed() == Request(stop=True)
    signal.raise_signal(signal.SIGTERM)  # after the training: torchrun passes on what the worker had already


def test_handlers_are_put_back_when_a_run_fails_that_was_asked_to_stop(default_signals):
    """As by a peer that died: torchrun's second signal ends this process, which has nothing to save any more."""
    with suppress(RuntimeError), watch_signals(ALONE):
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError
    assert {number: signal.getsignal(number) for number in default_signals} == default_signals


def test_under_nohup_sighup_stays_ignored(default_signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with watch_signals(ALONE) as signals:
        signal.raise_signal(signal.SIGHUP)
        assert signals.agreed() == Request()
