"""Which ranks of the group are still there, so that a dead one does not let the others wait for it for ever.

Each rank has a thread that sets its beat in the group's store once in a while and reads the others'. A rank is lost
when it says that it failed, when its process has ended (seen at once on the same machine), or when its beat stands
still for SILENT_BEATS beats. A collective that fails asks who it was; where the main thread hangs in one, this thread
ends the process. One rank, the lowest that is left, tells which rank was lost. So it is when the machine whose agent of
torchrun holds the store has gone: agents of other machines may never notice.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from fedpeft_dist.runtime.errors import PeerLostError
from fedpeft_dist.runtime.interrupts import StopRequest
from fedpeft_dist.runtime.launch import Launch

BEAT_SECONDS = 1.0
RANKS_PER_SECOND = 32
"""Larger groups beat more slowly: every rank reads every other's beat."""
SILENT_BEATS = 40
LAST_SECONDS = 5.0
"""That the main thread has to end by itself once a rank is lost."""
_DONE, _FAILED, _STOP = "done", "failed", "stop"


@dataclass(frozen=True)
class Member:
    """A rank's process, as it introduces itself to the others."""

    rank: int
    host: str
    pid: int
    started: str
    """Tells it from a later process of the same number."""
    place: str
    """Of the kernel and the process namespace in which `pid` means something; empty where that is not known."""

    @classmethod
    def this_process(cls, rank: int) -> Member:
        place = ""
        if Path("/proc/self/ns/pid").exists():
            place = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
        return cls(rank, socket.gethostname(), os.getpid(), _start_time(os.getpid()) or "", place)

    def has_ended(self, place: str) -> bool:
        """Whether the process is known to have ended; only one in the same place can be known."""
        return bool(place) and place == self.place and _start_time(self.pid) != self.started

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


def _start_time(pid: int) -> str | None:
    """Of a process, in the kernel's clock ticks; None where it has ended, also where its parent has yet to notice."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


class Peers:
    """The other ranks, watched from a thread from `start` to `leave`.

    Args:
        connect: makes a connection to the group's store, whose calls end within some seconds.
    """

    def __init__(self, connect: Callable[[], dist.Store], launch: Launch):
        self.connect, self.launch, self.rank = connect, launch, launch.rank
        self.ranks = range(launch.world_size)
        self.beat_seconds = max(BEAT_SECONDS, launch.world_size / RANKS_PER_SECOND)
        self.stop = StopRequest()
        """Of this rank's; what one rank is asked, the others learn from its beat."""
        self.last_will: Callable[[str], None] = lambda reason: None
        """Called before this process is ended from outside its main thread."""
        self._left, self._loss_found = threading.Event(), threading.Event()
        self._loss: PeerLostError | None = None
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._looked = time.monotonic()
        self.this = Member.this_process(self.rank)
        self.store = connect()
        self.store.set(f"member/{self.rank}", json.dumps(asdict(self.this)))
        self._beat("0")

    def start(self) -> None:
        """Begins to watch, once every rank has been made.

        Raises:
            PeerLostError: some rank has not been made in the time that a call on the store may take.
        """
        keys = [f"member/{rank}" for rank in self.ranks]
        try:
            found = self.store.multi_get(keys)
        except RuntimeError as error:
            missing = [rank for rank in self.ranks if not self.store.check([keys[rank]])]
            if not missing:
                raise
            message = f"rank {', '.join(map(str, missing))} was lost while the group was formed"
            raise PeerLostError(message, self.rank == min(set(self.ranks) - set(missing))) from error
        self.members = [Member(**json.loads(member)) for member in found]
        self._looked = time.monotonic()
        self._thread.start()
        if len(self.ranks) > 1 and (self.launch.agent_store or self.rank):  # else nobody's store matters, or it is ours
            threading.Thread(target=self._watch_store, name="store", daemon=True).start()

    def leave(self, failure: BaseException | None = None) -> None:
        """Tells the others that this rank has ended, well or with a failure of its own."""
        self._left.set()
        if self._thread.is_alive():
            self._thread.join(timeout=LAST_SECONDS)
        if self._thread.is_alive():  # it hangs in a store that does not answer
            return
        with suppress(RuntimeError):  # whoever held the store may have left before
            self._beat(_DONE if failure is None else _FAILED)

    def loss(self) -> PeerLostError | None:
        """Which rank was lost, after a collective has failed; None where all of them are still there after a while."""
        if len(self.ranks) == 1:
            return None
        self._loss_found.wait((SILENT_BEATS + 2) * self.beat_seconds)
        return self._loss

    @contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """
        Raises:
            PeerLostError: a collective inside failed because a rank was lost.
        """
        try:
            yield
        except RuntimeError as error:
            loss = self.loss()
            if loss is None:
                raise
            raise loss from error

    def _beat(self, value: str) -> None:
        self.store.set(f"beat/{self.rank}", value)

    def _watch(self) -> None:
        beats: dict[int, str] = {}
        changed = dict.fromkeys(self.ranks, time.monotonic())
        lost: dict[int, str] = {}
        count = 0
        while not lost and not self._left.wait(self.beat_seconds):
            count += 1
            try:
                self._beat(f"{count} {_STOP}" if self.stop.received else str(count))
                found = self.store.multi_get([f"beat/{rank}" for rank in self.ranks])
            except RuntimeError:
                if self.launch.agent_store:  # a connection may break; `_watch_store` tells when it is more than that
                    self._reconnect()
                    continue
                if self._left.wait(LAST_SECONDS):
                    return
                lost[0] = "has died, and with it the store that the group meets in"
                break
            now = time.monotonic()
            if now - self._looked > SILENT_BEATS * self.beat_seconds / 2:  # it was this process that was silent
                changed = dict.fromkeys(self.ranks, now)
            self._looked = now
            for rank, beat in enumerate(value.decode() for value in found):
                if beats.get(rank) != beat:
                    beats[rank], changed[rank] = beat, now
                if rank == self.rank or beat == _DONE:
                    continue
                if beat.endswith(_STOP):
                    self.stop.pass_on()
                if beat == _FAILED:
                    lost[rank] = "has failed, its own error says why"
                elif self.members[rank].has_ended(self.this.place):
                    lost[rank] = "has died"
                elif now - changed[rank] > SILENT_BEATS * self.beat_seconds:
                    lost[rank] = f"has given no sign of life for {now - changed[rank]:.0f} s"
        if lost:
            self._end_for(lost)

    def _reconnect(self) -> None:
        with suppress(OSError, RuntimeError):
            # A store that cannot connect waits, and prints pages about it.
            socket.create_connection((self.launch.address, self.launch.port), timeout=LAST_SECONDS).close()
            self.store = self.connect()

    def _watch_store(self) -> None:
        """The process that holds the store may hang, and with it whoever asks it for something."""
        silent = SILENT_BEATS * self.beat_seconds
        before = time.monotonic()
        while not (self._left.wait(self.beat_seconds) or self._loss_found.is_set()):
            now = time.monotonic()
            if now - before > silent / 2:  # it was this process that was silent
                self._looked = now
            before = now
            if now - self._looked > silent:
                silence = f"has given no sign of life for {now - self._looked:.0f} s"
                if self.launch.agent_store:  # which ranks are left, nobody knows: one of every agent's tells
                    place = f"{self.launch.address}:{self.launch.port}"
                    self._end(f"the store of torchrun's agent ({place}) {silence}", self.launch.local_rank == 0)
                else:
                    self._end_for({0: silence})
                return

    def _end_for(self, lost: dict[int, str]) -> None:
        told = "; ".join(f"{self.members[rank]} {what}" for rank, what in lost.items())
        self._end(told, self.rank == min(rank for rank in self.ranks if rank not in lost))

    def _end(self, told: str, is_told: bool) -> None:
        """Lets the main thread fail by itself, and ends this process if it does not."""
        self._loss = PeerLostError(told, is_told)
        self._loss_found.set()
        if self._left.wait(LAST_SECONDS):
            return
        # What follows may wait for a disk or a pipe that hangs, too.
        resort = threading.Timer(LAST_SECONDS, os._exit, (1,))
        resort.daemon = True
        resort.start()
        self.last_will(told)
        if is_told:
            print(f"error: {told}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
