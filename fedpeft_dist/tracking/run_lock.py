"""One writer for each run: a lock that ends with its holder, and a file that names the writer.

The lock (flock) keeps two processes from writing at once. It cannot settle one case. When a node's daemon dies, Slurm
starts the job again elsewhere, while the job's old processes still train and hold the lock. The new attempt then writes
its own name into the owner's file. The old attempt sees the name before it writes the next round, and ends without
writing anything.
"""

import json
import os
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from inspect import signature
from pathlib import Path

from filelock import FileLock, Timeout

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.runtime.files import write_text
from fedpeft_dist.runtime.interrupts import StoppedEarlyError, StopRequest

LOCK_SECONDS = 1.0
"""Seconds to wait for the lock, because `find_holder` holds it for a moment."""
LOOK_SECONDS = 1.0
"""Seconds between two looks at the owner's file."""
TAKEOVER_SECONDS = 1200.0
"""Seconds that a job's new attempt waits for the old one to let go; less than a group's time-out."""


class RunInUseError(ConfigError):
    """Another process is writing this run."""


@dataclass(frozen=True)
class Owner:
    """A process that writes a run, or is about to."""

    host: str
    pid: int
    job: str
    """The Slurm job's number; empty outside one."""
    attempt: int
    """How often Slurm had put the job back into its queue."""
    token: str
    """A text that no other owner has."""

    @classmethod
    def this_process(cls, job: str = "", attempt: int = 0) -> "Owner":
        return cls(socket.gethostname(), os.getpid(), job, attempt, uuid.uuid4().hex)

    def succeeds(self, other: "Owner") -> bool:
        """Whether this is a later attempt of the same job."""
        return bool(self.job) and self.job == other.job and self.attempt > other.attempt

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"host {self.host}, pid {self.pid}{job}"


class RunLock:
    """Makes this process the only writer of a run's directory, until it releases the lock or ends in any way.

    Raises:
        RunInUseError: another process is the writer, and stays so for LOCK_SECONDS.
        StoppedEarlyError: asked to stop while it waits for an earlier attempt of the same Slurm job.
        ConfigError: the directory cannot be made or locked.
    """

    def __init__(self, directory: Path, owner: Owner, stop: StopRequest):
        self.directory, self.owner, self.stop = directory, owner, stop
        self._lock = _flock(directory)
        self._made = [path for path in (directory, *directory.parents) if not path.exists()]
        self._looked = 0.0
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._acquire()
            self._write_owner(owner)
        except (OSError, NotImplementedError) as error:  # the second if a file system knows no locks
            self._lock.release()
            raise ConfigError(f"output.root: '{directory}' cannot be locked ({error}); give another folder") from None

    def is_ours(self) -> bool:
        """Whether this process may still write: a later attempt of its Slurm job may have taken the run over."""
        return read_owner(self.directory) in (self.owner, None)

    def look_around(self) -> None:
        """Asks the run to stop if it was taken over; looks once in LOOK_SECONDS at most."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            self.stop.received = self.stop.received or not self.is_ours()

    def release(self) -> None:
        """Lets go, and removes the folders that it has made if nothing was written to the run's."""
        if self._lock.is_locked and read_owner(self.directory) == self.owner:
            _owner_file(self.directory).unlink(missing_ok=True)
            if self._made and [path.name for path in self.directory.iterdir()] == [_lock_file(self.directory).name]:
                _lock_file(self.directory).unlink()
                with suppress(OSError):  # another run has begun below the same root
                    for folder in self._made:
                        folder.rmdir()
        self._lock.release()

    def _acquire(self) -> None:
        try:
            self._lock.acquire(timeout=LOCK_SECONDS, poll_interval=0.05)
            return
        except Timeout:
            holder = read_owner(self.directory)
        in_use = f"{self.directory}: another process is writing this run" + (f" ({holder})" if holder else "")
        if holder is None or not self.owner.succeeds(holder):
            raise RunInUseError(f"{in_use}; wait for it, or give another output.name")
        self._write_owner(self.owner)
        print(f"{in_use}, an earlier attempt of this job; waiting until it lets go", flush=True)
        deadline = time.monotonic() + TAKEOVER_SECONDS
        while True:
            try:
                self._lock.acquire(timeout=0.5, poll_interval=0.1)
                return
            except Timeout:
                if time.monotonic() < deadline and not self.stop.received:
                    continue
            self._write_owner(holder)  # it may go on
            if self.stop.received:
                raise StoppedEarlyError
            raise RunInUseError(f"{in_use}, and has not let go in {TAKEOVER_SECONDS:.0f} s; end it")

    def _write_owner(self, owner: Owner) -> None:
        write_text(_owner_file(self.directory), json.dumps(asdict(owner)) + "\n")


UNKNOWN = Owner("unknown", 0, "", 0, "")


def find_holder(directory: Path) -> Owner | None:
    """The process that is writing a run at this moment; `UNKNOWN` where it does not say who it is."""
    if not _lock_file(directory).exists():
        return None
    lock = _flock(directory)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return read_owner(directory) or UNKNOWN
    lock.release()
    return None


def read_owner(directory: Path) -> Owner | None:
    """The process that may write a run; None if no file says so, or if the file cannot be read just now."""
    try:
        return Owner(**json.loads(_owner_file(directory).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _flock(directory: Path) -> FileLock:
    # Newer versions of filelock put a file that outlives its holder in place of a lock, where the system has none.
    strict = {"fallback_to_soft": False} if "fallback_to_soft" in signature(FileLock.__init__).parameters else {}
    return FileLock(_lock_file(directory), **strict)


def _lock_file(directory: Path) -> Path:
    return directory / "lock"


def _owner_file(directory: Path) -> Path:
    return directory / "owner.json"
