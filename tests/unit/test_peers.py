"""Watching the other ranks: two ranks' watchers in one process, with quick beats."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta

import pytest
import torch.distributed as dist

from fedpeft_dist.runtime import peers
from fedpeft_dist.runtime.peers import Member, Peers

BEAT = 0.05


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "BEAT_SECONDS", BEAT)
    monkeypatch.setattr(peers, "SILENT_BEATS", 20)
    monkeypatch.setattr(peers, "LAST_SECONDS", 0.5)


class Exits:
    """Stands in for `os._exit`, which would end the test."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.happened = threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.happened.set()


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> Exits:
    found = Exits()
    monkeypatch.setattr(peers.os, "_exit", found)
    return found


@pytest.fixture
def store() -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5))


@pytest.fixture
def process() -> Iterator[subprocess.Popen]:
    """Another rank's process."""
    found = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    yield found
    found.kill()
    found.wait()


def introduce(store: dist.Store, member: Member, beat: str = "0") -> None:
    """What another rank tells of itself."""
    store.set(f"member/{member.rank}", json.dumps(asdict(member)))
    store.set(f"beat/{member.rank}", beat)


def member_of(process: subprocess.Popen, rank: int, place: str | None = None) -> Member:
    this = Member.this_process(rank)
    return Member(rank, "n1", process.pid, peers._start_time(process.pid), this.place if place is None else place)


def start(store: dist.Store, rank: int, world_size: int, is_agents: bool = False) -> Peers:
    found = Peers(store, rank, world_size, is_agents)
    found.start()
    return found


def test_ranks_that_live_and_leave_lose_nobody(store: dist.Store, exits: Exits) -> None:
    made = [Peers(store, rank, 3, False) for rank in range(3)]
    for one in made:
        one.start()
    time.sleep(30 * BEAT)
    made[1].leave()
    time.sleep(30 * BEAT)
    made[0].leave()
    made[2].leave()
    assert exits.codes == []
    assert made[0].loss() is None


def test_a_process_that_has_ended_is_lost_at_once(
    store: dist.Store, exits: Exits, process: subprocess.Popen, capsys: pytest.CaptureFixture[str]
) -> None:
    introduce(store, member_of(process, 1))
    watcher, told = Peers(store, 0, 2, False), []
    watcher.last_will = told.append
    watcher.start()
    time.sleep(3 * BEAT)
    process.kill()  # and is not waited for: a zombie has ended, too
    started = time.monotonic()
    loss = watcher.loss()
    assert time.monotonic() - started < 10 * BEAT
    assert str(loss) == f"rank 1 (host n1, pid {process.pid}) has died"
    assert loss.is_told
    assert exits.happened.wait(10)  # this thread goes on as if it hung in a collective
    assert told == [str(loss)]
    assert capsys.readouterr().err == f"error: {loss}\n"
    assert exits.codes == [1]


def test_who_ends_by_itself_is_not_ended(store: dist.Store, exits: Exits, process: subprocess.Popen) -> None:
    introduce(store, member_of(process, 1))
    watcher = start(store, 0, 2)
    process.kill()
    assert watcher.loss() is not None
    watcher.leave(RuntimeError())
    assert not exits.happened.wait(1)


def test_a_silent_rank_is_lost_after_a_while(store: dist.Store, exits: Exits, process: subprocess.Popen) -> None:
    """On another machine, or in another container, nothing else can be known of it."""
    introduce(store, member_of(process, 1, place="elsewhere"))
    watcher, started = start(store, 0, 2), time.monotonic()
    process.kill()
    process.wait()
    loss = watcher.loss()
    assert 20 * BEAT <= time.monotonic() - started < 80 * BEAT
    assert "has given no sign of life for 1 s" in str(loss)
    watcher.leave(loss)


def test_a_rank_that_has_failed_says_so(store: dist.Store, exits: Exits) -> None:
    first, second = Peers(store, 0, 2, False), Peers(store, 1, 2, False)
    first.start()
    second.start()
    first.leave(ValueError("no such thing"))
    loss = second.loss()
    assert "has failed, its own error says why" in str(loss)
    assert str(loss).startswith("rank 0 (host ")
    second.leave(loss)


def test_one_rank_tells(store: dist.Store, exits: Exits, process: subprocess.Popen) -> None:
    introduce(store, member_of(process, 0))
    made = [Peers(store, rank, 4, False) for rank in (1, 2, 3)]
    for one in made:
        one.start()
    process.kill()
    losses = [one.loss() for one in made]
    for one, loss in zip(made, losses):
        one.leave(loss)
    # Whoever looked later may have met the others' own failures, but the first rank that is left is always told.
    assert losses[0].is_told
    assert all(str(loss).startswith("rank 0 ") for loss in losses)
    assert [loss.is_told for loss in losses[1:]] == [False, False]


def test_a_number_that_another_process_has_now(process: subprocess.Popen) -> None:
    member = member_of(process, 1)
    assert not member.has_ended(member.place)
    later = Member(1, member.host, member.pid, "1", member.place)
    assert later.has_ended(member.place)
    assert not later.has_ended("elsewhere")
    nowhere = Member(1, member.host, member.pid, "1", "")
    assert not nowhere.has_ended("")


def test_the_end_of_the_store(exits: Exits) -> None:
    """Rank 0's store ends with rank 0; the agent's is no sign of anything."""
    for is_agents in (True, False):
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5))
        first = Peers(server, 0, 2, is_agents)
        client = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=5))
        second = Peers(client, 1, 2, is_agents)
        second.start()
        del first, server
        gc.collect()
        if is_agents:
            time.sleep(10 * BEAT)
            assert not second._loss_found.is_set()
        else:
            assert "has died, and with it the store" in str(second.loss())
        second.leave()
