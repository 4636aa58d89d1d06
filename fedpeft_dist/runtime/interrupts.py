"""Signals that ask a run to stop at a round boundary."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""SIGHUP comes when the terminal is closed."""
GRACE_SECONDS = 10.0
"""Seconds that a round, or the work before the first one, may go on after it has noticed the request."""
LOOK_SECONDS = 0.1
T = TypeVar("T")


class StoppedEarlyError(BaseException):
    """Work that leaves nothing to save was asked to stop. Like KeyboardInterrupt, no `except Exception` catches it."""


@dataclass
class StopRequest:
    """Whether this process was asked to stop."""

    received: bool = False
    """Set by a signal, or by the thread that learns of another rank's request."""
    is_heard: bool = False
    """Whether this process's signals arrive here."""
    _noticed: float | None = None
    _is_limited: bool = False

    def is_overdue(self) -> bool:
        """Whether to drop the current round. The first call after the request starts the grace period."""
        if not self.received:
            return False
        if self._noticed is None:
            self._noticed = time.monotonic()
        return time.monotonic() - self._noticed > GRACE_SECONDS

    def within_grace(self, work: Callable[[], T]) -> T | None:
        """Returns the result of `work`, or None if it goes on for too long after a request. It has nothing to lose."""
        if not self.is_heard:
            return work()
        self._noticed, self._is_limited = None, True
        is_done = threading.Event()

        def break_off() -> None:
            while not is_done.wait(LOOK_SECONDS):
                if self.is_overdue():  # nothing but a real signal ends waiting for a lock or a disk
                    os.kill(os.getpid(), signal.SIGTERM)
                    return

        watcher = threading.Thread(target=break_off, daemon=True)
        watcher.start()
        try:
            return work()
        except StoppedEarlyError:
            return None
        finally:
            self._is_limited = False
            is_done.set()
            watcher.join()
            self._noticed = None

    def notice(self) -> None:
        """Takes a signal, from outside or from `within_grace`."""
        self.received = True
        if self._is_limited and self.is_overdue():
            self._is_limited = False
            raise StoppedEarlyError


@contextmanager
def listen_for_stop(is_last: bool = False) -> Iterator[StopRequest]:
    """Turns the stop signals into a flag for as long as the context lasts; a second SIGINT interrupts at once.

    SIGHUP stays ignored if it is ignored already: nohup starts a process that way. If this process ends after the
    context (`is_last`) and no error was raised, late signals of launchers and Slurm are ignored, so that they cannot
    change the exit code.
    """
    request = StopRequest(is_heard=True)

    def remember(number: int, frame: object) -> None:
        if request.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.notice()

    is_kept = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    heard = [number for number in STOP_SIGNALS if not is_kept or number != signal.SIGHUP]
    previous = {number: signal.signal(number, remember) for number in heard}
    try:
        yield request
        if is_last:
            previous |= {number: signal.SIG_IGN for number in heard if number != signal.SIGINT}
    finally:
        request.is_heard = False
        for number, handler in previous.items():
            if signal.getsignal(number) is remember:  # a handler that was set meanwhile stays
                signal.signal(number, handler)


def stop_with_parent() -> None:
    """Has the kernel send SIGTERM to this process when its parent ends, however that happens (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
