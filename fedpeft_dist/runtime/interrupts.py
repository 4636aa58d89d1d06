"""Signals that ask a run to stop at a round boundary."""

from __future__ import annotations

import ctypes
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE_SECONDS = 10.0
"""How long a round may still go on once it has noticed the request; it is dropped then."""
_PR_SET_PDEATHSIG = 1


@dataclass
class StopRequest:
    """Whether this process was asked to stop."""

    received: bool = False
    _noticed: float | None = field(default=None, init=False)

    def is_overdue(self) -> bool:
        """Whether the round in work is to be dropped: the first call after the request starts the grace period."""
        if not self.received:
            return False
        if self._noticed is None:
            self._noticed = time.monotonic()
        return time.monotonic() - self._noticed > GRACE_SECONDS


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


def stop_with_parent() -> None:
    """Lets the kernel send SIGTERM here when the process that started this one ends, however it does (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
