"""One writer a run, also where Slurm starts a job again while its old processes are still there."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.tracking import run_lock
from fedpeft_dist.tracking.run_directory import RunDirectory
from fedpeft_dist.tracking.run_lock import UNKNOWN, Owner, RunInUseError


def attempt(number: int, job: str = "41") -> Owner:
    return Owner.this_process(job, number)


def test_the_holder_is_known_while_it_holds(tmp_path: Path) -> None:
    directory, owner = RunDirectory(tmp_path / "run"), attempt(0, "")
    assert directory.holder() is None
    lock = directory.lock(owner)
    assert directory.holder() == directory.owner() == owner
    assert directory.in_use()
    lock.release()
    assert directory.holder() is None
    assert directory.owner() is None
    assert not directory.in_use()
    directory.lock().release()


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    directory, owner = RunDirectory(tmp_path), attempt(0, "")
    lock = directory.lock(owner)
    with pytest.raises(RunInUseError, match=f"another process is writing this run .*host .*, pid {owner.pid}"):
        directory.lock()
    assert directory.owner() == owner
    lock.release()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (attempt(1), attempt(1)),  # two steps of one job
        (attempt(1), attempt(0)),  # the old attempt comes late
        (attempt(0, "41"), attempt(1, "42")),  # another job
        (attempt(0, ""), attempt(1, "")),  # no jobs at all
    ],
)
def test_only_a_later_attempt_of_the_same_job_takes_over(tmp_path: Path, first: Owner, second: Owner) -> None:
    directory = RunDirectory(tmp_path)
    lock = directory.lock(first)
    with pytest.raises(RunInUseError):
        directory.lock(second)
    assert directory.owner() == first
    lock.release()


def test_a_later_attempt_waits_until_the_earlier_one_has_let_go(tmp_path: Path) -> None:
    directory, old, new = RunDirectory(tmp_path), attempt(0), attempt(1)
    lock = directory.lock(old)
    taken: list[float] = []

    def take_over() -> None:
        second = directory.lock(new)
        taken.append(time.monotonic())
        assert directory.holder() == new
        second.release()

    thread = threading.Thread(target=take_over)
    thread.start()
    deadline = time.monotonic() + 20
    while directory.owner() != new:  # the old one sees that it has been succeeded, and still holds the lock
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert taken == []
    released = time.monotonic()
    lock.release()
    thread.join(timeout=20)
    assert taken[0] >= released
    assert directory.owner() is None  # the old one's release has not removed the new one's name, the new one's has


def test_a_later_attempt_gives_up_on_one_that_never_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "TAKEOVER_SECONDS", 0.2)
    directory = RunDirectory(tmp_path)
    lock = directory.lock(attempt(0))
    with pytest.raises(RunInUseError, match="has not let go in 0 s; end it"):
        directory.lock(attempt(1))
    lock.release()


def test_a_lock_ends_with_its_holder_and_its_half_written_files_go(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from fedpeft_dist.runtime.files import write_atomically
from fedpeft_dist.tracking.run_directory import RunDirectory
directory = RunDirectory(Path({str(tmp_path)!r}))
directory.lock()
directory.checkpoints.mkdir()
for path in (directory.summary_file, directory.checkpoints / "round-000001.safetensors"):
    if os.fork() == 0:
        write_atomically(path, lambda temporary: (temporary.touch(), os.kill(os.getpid(), signal.SIGKILL)))
    os.wait()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    directory = RunDirectory(tmp_path)
    assert len(list(tmp_path.rglob(".tmp-*"))) == 2
    assert not directory.in_use()
    directory.lock().release()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoints", "lock"]


def test_a_holder_that_has_not_said_who_it_is(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    lock = directory.lock(attempt(0))
    for content in ("", "{}", "[]", '{"host": 3}'):
        (tmp_path / "owner.json").write_text(content)
        assert directory.holder() == UNKNOWN
        with pytest.raises(RunInUseError, match="another process is writing this run; wait for it"):
            directory.lock(attempt(1))
    lock.release()


def test_a_place_that_cannot_be_locked_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"output\.root: '.*file/run' cannot be locked"):
        RunDirectory(tmp_path / "file" / "run").lock()
