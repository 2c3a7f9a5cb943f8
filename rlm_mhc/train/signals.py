"""Signals as requests to the training loop: finish and save, or save and go on."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NamedTuple

import torch

from rlm_mhc.parallel import Ranks, Vote

STOPPING = ("SIGTERM", "SIGINT")
SAVING = ("SIGUSR1",)


class Request(NamedTuple):
    """What all ranks are to do after this step."""

    stop: bool = False
    save: bool = False


class Signals:
    """Notes the signals that come in; the first that stops asks for the end of the step, a second one exits at once."""

    def __init__(self, ranks: Ranks) -> None:
        self.vote = Vote(ranks)
        self.stop, self.save, self.is_first = "", False, ranks.is_first

    def agreed(self) -> Request:
        """What any rank was asked for, known to all of them in the same step: to be called once per step by each."""
        asked = torch.tensor([bool(self.stop), self.save], dtype=torch.int32, device="cpu")
        if asked[1]:  # else one that comes now would be lost
            self.save = False
        stop, save = self.vote.exchange(asked).bool().tolist()
        return Request(stop, save)

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Note a signal."""
        name = signal.Signals(number).name
        if name in SAVING:
            self.save = True
        elif self.stop:
            os._exit(128 + number)
        else:
            self.stop = name
            if self.is_first:
                said = f"\n{name}: finishing the step, then saving; once more ends it now\n"
                # Not print: the signal may have come in the middle of one.
                with suppress(OSError):
                    os.write(sys.stderr.fileno(), said.encode())


@contextmanager
def watch_signals(ranks: Ranks) -> Iterator[Signals]:
    """Receive SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 where the system has them, until the context is left; outside of
    the main thread, which alone gets signals, none."""
    signals = Signals(ranks)
    former = {number: signal.signal(number, signals.receive) for number in _receivable(STOPPING + SAVING)}
    try:
        yield signals
        signals.vote.close()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def ignore_saving() -> None:
    """Let SIGUSR1 do nothing, rather than end the process, until there is something to save."""
    for number in _receivable(SAVING):
        signal.signal(number, signal.SIG_IGN)


def _receivable(names: tuple[str, ...]) -> list[signal.Signals]:
    here = threading.current_thread() is threading.main_thread()
    return [getattr(signal, name) for name in names if here and hasattr(signal, name)]
