"""Cells' processes that are forked off a server."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpeft_dist.sweeps.warm_start import WarmServer, _Forked

CELL = ["sweep", "run", "none.yaml", "--index", "3"]
MISTAKE = "error: none.yaml: no such config file"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands orphans to another process")


@pytest.fixture
def server() -> Iterator[WarmServer]:
    with WarmServer() as server:
        server.modules = ("fedpeft_dist.cli",)
        yield server


def test_a_forked_process_is_a_child_with_a_session_and_a_log_of_its_own(server: WarmServer, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    process = server.start(CELL, {}, log)
    assert isinstance(process, _Forked)
    assert os.getsid(process.pid) == process.pid  # also after its end, until it is waited for
    assert process.wait() == process.poll() == 2
    told = log.read_text()
    assert told.startswith(f"before\n{MISTAKE}")
    assert told.count("\n") == 2


def test_a_signal_is_its_exit_code(server: WarmServer, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "waits.yaml")  # nobody writes to it, so reading it lasts for ever
    process = server.start(["sweep", "run", str(tmp_path / "waits.yaml"), "--index", "0"], {}, tmp_path / "log.txt")
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.terminate()  # it has ended, so nothing is sent


def test_without_a_server_processes_are_started_plainly(server: WarmServer, tmp_path: Path) -> None:
    assert server.start(CELL, {}, tmp_path / "log.txt").wait() == 2
    server._server.kill()
    server._server.wait()
    process = server.start(CELL, {}, tmp_path / "again.txt")
    assert not isinstance(process, _Forked)
    assert process.wait() == 2
    assert (tmp_path / "again.txt").read_text() == (tmp_path / "log.txt").read_text()
