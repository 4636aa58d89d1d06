"""Signals as a request to stop, and the round that they find in work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpeft_dist.runtime import interrupts
from fedpeft_dist.runtime.interrupts import STOP_SIGNALS, StopRequest, listen_for_stop


@pytest.fixture
def hangup() -> Iterator[None]:
    """SIGHUP as a terminal's shell leaves it, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_remembered_and_handlers_are_restored(hangup: None, number: int) -> None:
    before = signal.getsignal(number)
    with listen_for_stop() as stop:
        assert not stop.received
        os.kill(os.getpid(), number)
        assert stop.received
        if number != signal.SIGINT:
            os.kill(os.getpid(), number)  # again, with no more effect
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("is_last", [False, True])
def test_an_ignored_hangup_stays_ignored(hangup: None, is_last: bool) -> None:
    """nohup starts a process like that."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with listen_for_stop(is_last) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.received
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


LAST = """
import os, signal
from fedpeft_dist.runtime.interrupts import STOP_SIGNALS, listen_for_stop
with listen_for_stop(is_last=True):
    pass
for number in STOP_SIGNALS:
    if number != signal.SIGINT:
        os.kill(os.getpid(), number)
"""


def test_a_late_signal_changes_no_exit_code() -> None:
    assert subprocess.run([sys.executable, "-c", LAST], timeout=60).returncode == 0


def test_a_second_ctrl_c_stops_at_once() -> None:
    with listen_for_stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_round_is_overdue_after_the_grace_period(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: now[0])
    stop = StopRequest()
    assert not stop.is_overdue()
    now[0] += 1000
    stop.received = True
    assert not stop.is_overdue()
    now[0] += 9.9
    assert not stop.is_overdue()
    now[0] += 0.2
    assert stop.is_overdue()


def test_another_ranks_stop_request_ends_work_within_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "GRACE_SECONDS", 0.1)
    with listen_for_stop() as stop:
        other = threading.Timer(0.1, setattr, (stop, "received", True))
        other.start()
        started = time.monotonic()
        assert stop.within_grace(lambda: time.sleep(60)) is None
        assert time.monotonic() - started < 30
        assert stop.received
        other.join()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death is Linux's")
def test_a_process_is_asked_to_stop_when_its_parent_dies(tmp_path: Path) -> None:
    child = f"""
import time
from pathlib import Path
from fedpeft_dist.runtime.interrupts import listen_for_stop, stop_with_parent
with listen_for_stop() as stop:
    stop_with_parent()
    Path({str(tmp_path / "ready")!r}).touch()
    deadline = time.monotonic() + 60
    while not stop.received and time.monotonic() < deadline:
        time.sleep(0.01)
    Path({str(tmp_path / "told")!r}).write_text(str(stop.received))
"""
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent])
    wait_for(tmp_path / "ready")
    process.kill()
    process.wait()
    wait_for(tmp_path / "told")
    assert (tmp_path / "told").read_text() == "True"


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and (path.name == "ready" or path.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.01)
