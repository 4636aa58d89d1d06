"""Signals that ask a run to stop at the next round boundary."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass
class StopRequest:
    """Whether this process was asked to stop."""

    received: bool = False


@contextmanager
def listen_for_stop() -> Iterator[StopRequest]:
    """Turns the stop signals into a flag for as long as the context lasts; a second SIGINT interrupts at once."""
    request = StopRequest()

    def remember(number: int, frame: object) -> None:
        if request.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.received = True

    previous = {number: signal.signal(number, remember) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
