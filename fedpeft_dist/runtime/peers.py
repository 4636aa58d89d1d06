"""Which ranks of the group are still running, so that a dead one does not let the others wait for it for ever.

Each rank has a thread that sets its beat in the group's store regularly and reads the others'. A rank is lost when it
says that it failed, when its process has ended (seen at once on the same machine), or when its beat stands still for
SILENT_BEATS beats. A failed collective asks which rank was lost. If the main thread hangs in a collective, a thread
ends the process. The lowest rank that is left prints which rank was lost.

The store may hang as well, or be gone with the machine of torchrun's agent that serves it; agents of other machines may
never notice. So the thread that judges the beats is another one than the thread that talks to the store.
"""

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

from fedpeft_dist.config.errors import PeerLostError
from fedpeft_dist.runtime.interrupts import StopRequest
from fedpeft_dist.runtime.launch import Launch

BEAT_SECONDS = 1.0
RANKS_PER_SECOND = 32
"""Larger groups beat more slowly: every rank reads every other's beat."""
SILENT_BEATS = 40
LAST_SECONDS = 5.0
"""Seconds that the main thread has to end by itself once a rank is lost."""
_DONE, _FAILED, _STOP = "done", "failed", "stop"


@dataclass(frozen=True)
class Member:
    """A rank's process, as it introduces itself to the others.

    `started`, its start time, tells it from a later process of the same number. `place` is the kernel and the process
    namespace in which `pid` is valid; empty if unknown.
    """

    rank: int
    host: str
    pid: int
    started: str
    place: str

    @classmethod
    def this_process(cls, rank: int) -> "Member":
        place = ""
        if Path("/proc/self/ns/pid").exists():
            place = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
        return cls(rank, socket.gethostname(), os.getpid(), _start_time(os.getpid()) or "", place)

    def has_ended(self, place: str) -> bool:
        """Whether the process is known to have ended. Nothing is known of a process in another place."""
        return bool(place) and place == self.place and _start_time(self.pid) != self.started

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


def _start_time(pid: int) -> str | None:
    """A process's start in the kernel's clock ticks; None if it has ended, even if its parent has yet to notice."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


class Peers:
    """The other ranks, watched by threads from `start` to `leave`.

    `connect` makes a connection to the group's store, whose calls end within some seconds, unless the store hangs.
    """

    def __init__(self, connect: Callable[[], dist.Store], launch: Launch):
        self.connect, self.launch, self.rank = connect, launch, launch.rank
        self.ranks = range(launch.world_size)
        self.beat_seconds = max(BEAT_SECONDS, launch.world_size / RANKS_PER_SECOND)
        self.stop = StopRequest()
        """This rank's request to stop. Its beat passes the request on to the other ranks."""
        self.last_will: Callable[[str], None] = lambda reason: None
        """Called with the reason before a thread ends this process."""
        self.this = Member.this_process(self.rank)
        self._left, self._loss_found = threading.Event(), threading.Event()
        self._loss: PeerLostError | None = None
        self._beats: list[str] = []
        self._answered = time.monotonic()
        """When the store last answered, with these beats of the ranks."""
        self._store_ended = False
        self._talker = threading.Thread(target=self._talk, daemon=True)
        self.store = connect()
        self.store.set(f"member/{self.rank}", json.dumps(asdict(self.this)))
        self._beat("0")

    @property
    def longest_search(self) -> float:
        """Seconds until a lost rank is known and this process has ended, at most."""
        return (SILENT_BEATS + 5) * self.beat_seconds + 3 * LAST_SECONDS

    def start(self) -> None:
        """Begins to watch once every rank is there. Raises PeerLostError if one stays missing."""
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
        if len(self.ranks) > 1:
            self._answered = time.monotonic()
            self._talker.start()
            threading.Thread(target=self._judge, daemon=True).start()

    def leave(self, failure: BaseException | None = None) -> None:
        """Tells the other ranks that this one has ended, well or with a failure of its own."""
        self._left.set()
        if self._talker.is_alive():
            self._talker.join(timeout=LAST_SECONDS)
        if self._talker.is_alive():  # it hangs in a store that does not answer
            return
        with suppress(RuntimeError):  # the rank that held the store may have left before
            self._beat(_DONE if failure is None else _FAILED)

    def loss(self) -> PeerLostError | None:
        """Which rank was lost, after a collective has failed; None if all are still running after a while."""
        if len(self.ranks) > 1:
            self._loss_found.wait((SILENT_BEATS + 5) * self.beat_seconds)  # each thread may add a beat or two
        return self._loss

    @contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """Raises PeerLostError if a collective inside failed because a rank was lost."""
        try:
            yield
        except RuntimeError as error:
            if loss := self.loss():
                raise loss from error
            raise

    @contextmanager
    def limit(self, seconds: float, told: str) -> Iterator[None]:
        """Ends this process with an error if the work inside takes longer."""
        timer = threading.Timer(seconds, self._end, (told, self.rank == 0))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _beat(self, value: str) -> None:
        self.store.set(f"beat/{self.rank}", value)

    def _talk(self) -> None:
        """Sets this rank's beat and reads all ranks' until this rank leaves, one is lost, or the store has ended."""
        keys, count = [f"beat/{rank}" for rank in self.ranks], 0
        while not (self._left.wait(self.beat_seconds) or self._loss_found.is_set()):
            count += 1
            try:
                self._beat(f"{count} {_STOP}" if self.stop.received else str(count))
                self._beats = [beat.decode() for beat in self.store.multi_get(keys)]
                self._answered = time.monotonic()
            except RuntimeError:
                if not self.launch.agent_store:
                    self._store_ended = True
                    return
                # A connection may break, and `_judge` notices if the store stays silent. A store that cannot connect
                # waits, and prints pages about it.
                with suppress(OSError, RuntimeError):
                    socket.create_connection((self.launch.address, self.launch.port), timeout=LAST_SECONDS).close()
                    self.store = self.connect()

    def _judge(self) -> None:
        """Ends this process when another rank or the store is lost, unless its main thread ends it first."""
        before = time.monotonic()
        seen, changed = [""] * len(self.ranks), [before] * len(self.ranks)
        lost: dict[int, str] = {}
        while not lost and not self._left.wait(self.beat_seconds):
            now = time.monotonic()
            if now - before > SILENT_BEATS * self.beat_seconds / 2:  # this process was silent itself: it was suspended
                self._answered, changed = now, [now] * len(self.ranks)
            before = now
            if self._store_ended:
                if self._left.wait(LAST_SECONDS):
                    return
                lost[0] = "has died, and with it the store that the group meets in"
            elif (silence := self._silence(now - self._answered)) and self.launch.agent_store:
                # Nobody knows which ranks are left, so one rank of every agent prints it.
                place = f"{self.launch.address}:{self.launch.port}"
                self._end(f"the store of torchrun's agent ({place}) {silence}", self.launch.local_rank == 0)
                return
            elif silence and self.rank:
                lost[0] = silence
            else:
                for rank, beat in enumerate(self._beats):
                    if seen[rank] != beat:
                        seen[rank], changed[rank] = beat, now
                    if beat.endswith(_STOP):
                        self.stop.received = True
                    if rank == self.rank or beat == _DONE:
                        continue
                    if beat == _FAILED:
                        lost[rank] = "has failed, its own error says why"
                    elif self.members[rank].has_ended(self.this.place):
                        lost[rank] = "has died"
                    elif silence := self._silence(now - changed[rank]):
                        lost[rank] = silence
        if lost:
            told = "; ".join(f"{self.members[rank]} {what}" for rank, what in lost.items())
            self._end(told, self.rank == min(rank for rank in self.ranks if rank not in lost))

    def _silence(self, seconds: float) -> str:
        is_lost = seconds > SILENT_BEATS * self.beat_seconds
        return f"has given no sign of life for {seconds:.0f} s" if is_lost else ""

    def _end(self, told: str, is_told: bool) -> None:
        """Lets the main thread fail by itself, and ends this process if it does not."""
        self._loss = PeerLostError(told, is_told)
        self._loss_found.set()
        if self._left.wait(LAST_SECONDS):
            return
        # The steps below may also wait for a disk or a pipe that hangs.
        resort = threading.Timer(LAST_SECONDS, os._exit, (1,))
        resort.daemon = True
        resort.start()
        self.last_will(told)
        if is_told:
            print(f"error: {told}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
