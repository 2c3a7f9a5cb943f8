"""Signals as requests to the training loop: finish and save, or save and go on."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NamedTuple

import torch

from rlm_mhc.parallel import DelayedFlags, Ranks

STOPPING = ("SIGTERM", "SIGINT", "SIGHUP")
SAVING = ("SIGUSR1",)
# A batch system signals torchrun and its workers, and torchrun passes its own signal on: both are one request.
REPEAT_SECONDS = 5.0


class Request(NamedTuple):
    """What all ranks are to do after this step."""

    stop: bool = False
    save: bool = False


class Signals:
    """Notes the signals that come in. The first one of `STOPPING` asks for the end after this step. Those within
    `REPEAT_SECONDS` of it are the same request; a later one ends the process at once."""

    def __init__(self, ranks: Ranks) -> None:
        self.vote = DelayedFlags(ranks)
        self.stop, self.save, self.is_first = "", False, ranks.is_first
        self.stopped = 0.0

    def agreed(self) -> Request:
        """What any rank was asked for, known to all of them in the same step: to be called once per step by each."""
        asked = torch.tensor([bool(self.stop), self.save], dtype=torch.int32, device="cpu")
        if asked[1]:  # else one that comes now would be lost
            self.save = False
        stop, save = self.vote.exchange(asked).bool().tolist()
        if stop and not self.stop:
            self.stop, self.stopped = "another rank", time.monotonic()
        return Request(stop, save)

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Note a signal."""
        name = signal.Signals(number).name
        if name in SAVING:
            self.save = True
        elif not self.stop:
            self.stop, self.stopped = name, time.monotonic()
            if self.is_first:
                _say(f"\n{name}: finishing the step, then saving; once more after {REPEAT_SECONDS:.0f} s ends it now\n")
        elif time.monotonic() - self.stopped > REPEAT_SECONDS:
            os._exit(128 + number)


@contextmanager
def watch_signals(ranks: Ranks) -> Iterator[Signals]:
    """Receive the signals of `STOPPING` and `SAVING` that the system has until the context is left; outside of the main
    thread, which alone gets signals, none.

    A process that was asked to stop receives them to its end, so that a repeat does not cut off what follows the
    training. SIGHUP stays ignored where it is, as under `nohup`.
    """
    signals = Signals(ranks)
    former = {number: signal.signal(number, signals.receive) for number in _receivable(STOPPING + SAVING)}
    try:
        yield signals
        signals.vote.close()
        former = {} if signals.stop else former
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def ignore_saving() -> None:
    """Let SIGUSR1 do nothing, rather than end the process, until there is something to save."""
    for number in _receivable(SAVING):
        signal.signal(number, signal.SIG_IGN)


def _receivable(names: tuple[str, ...]) -> list[signal.Signals]:
    if threading.current_thread() is not threading.main_thread():
        return []
    known = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [number for number in known if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN]


def _say(text: str) -> None:
    """Write to stderr. Not by print: the signal may have come in the middle of one."""
    with suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), text.encode())
