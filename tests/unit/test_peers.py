"""Watching the other ranks: two ranks' watchers in one process, with quick beats."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta

import pytest
import torch.distributed as dist

from fedpeft_dist.config.errors import PeerLostError
from fedpeft_dist.runtime import peers
from fedpeft_dist.runtime.launch import Launch
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
    """Writes another rank's entries into the store."""
    store.set(f"member/{member.rank}", json.dumps(asdict(member)))
    store.set(f"beat/{member.rank}", beat)


def member_of(process: subprocess.Popen, rank: int, place: str | None = None) -> Member:
    this = Member.this_process(rank)
    return Member(rank, "n1", process.pid, peers._start_time(process.pid), this.place if place is None else place)


def make(store: dist.Store, rank: int, world_size: int) -> Peers:
    return Peers(lambda: store, Launch(rank, world_size))


def start(store: dist.Store, rank: int, world_size: int) -> Peers:
    found = make(store, rank, world_size)
    found.start()
    return found


def test_no_rank_is_lost_while_ranks_run_and_leave(store: dist.Store, exits: Exits) -> None:
    made = [make(store, rank, 3) for rank in range(3)]
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
    watcher, told = make(store, 0, 2), []
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


def test_a_rank_that_ends_by_itself_is_not_killed(store: dist.Store, exits: Exits, process: subprocess.Popen) -> None:
    introduce(store, member_of(process, 1))
    watcher = start(store, 0, 2)
    process.kill()
    assert watcher.loss() is not None
    watcher.leave(RuntimeError())
    assert not exits.happened.wait(1)


def test_a_silent_rank_is_lost_after_a_while(store: dist.Store, exits: Exits, process: subprocess.Popen) -> None:
    """Nothing but its silence is known of a rank on another machine or in another container."""
    introduce(store, member_of(process, 1, place="elsewhere"))
    watcher, started = start(store, 0, 2), time.monotonic()
    process.kill()
    process.wait()
    loss = watcher.loss()
    assert 20 * BEAT <= time.monotonic() - started < 80 * BEAT
    assert "has given no sign of life for 1 s" in str(loss)
    watcher.leave(loss)


def test_a_failed_rank_is_reported(store: dist.Store, exits: Exits) -> None:
    first, second = make(store, 0, 2), make(store, 1, 2)
    first.start()
    second.start()
    first.leave(ValueError("no such thing"))
    loss = second.loss()
    assert "has failed, its own error says why" in str(loss)
    assert str(loss).startswith("rank 0 (host ")
    second.leave(loss)


def test_only_one_rank_prints_the_loss(store: dist.Store, exits: Exits, process: subprocess.Popen) -> None:
    introduce(store, member_of(process, 0))
    made = [make(store, rank, 4) for rank in (1, 2, 3)]
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


def test_a_reused_process_number_counts_as_ended(process: subprocess.Popen) -> None:
    member = member_of(process, 1)
    assert not member.has_ended(member.place)
    later = Member(1, member.host, member.pid, "1", member.place)
    assert later.has_ended(member.place)
    assert not later.has_ended("elsewhere")
    nowhere = Member(1, member.host, member.pid, "1", "")
    assert not nowhere.has_ended("")


def test_the_end_of_rank_0s_store_is_reported(exits: Exits) -> None:
    """Rank 0's store ends with rank 0."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5))
    first = make(server, 0, 2)
    second = start(client_of(server), 1, 2)
    del first, server
    gc.collect()
    assert "has died, and with it the store" in str(second.loss())
    second.leave()


def client_of(server: dist.TCPStore) -> dist.Store:
    return dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=5))


class Agent:
    """torchrun's agent in a process of its own, which serves the store of two ranks."""

    def __init__(self) -> None:
        serve = (
            "import time, torch.distributed as dist\n"
            "store = dist.TCPStore('127.0.0.1', 0, is_master=True)\n"
            "print(store.port, flush=True)\n"
            "time.sleep(300)"
        )
        self.process = subprocess.Popen([sys.executable, "-c", serve], stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())

    def connect(self) -> dist.Store:
        return dist.TCPStore("127.0.0.1", self.port, is_master=False, timeout=timedelta(seconds=1))

    def break_connections(self) -> int:
        """Breaks this process's connections to the store; returns how many there were."""
        count = 0
        for descriptor in os.listdir("/proc/self/fd"):
            with suppress(OSError), socket.socket(fileno=os.dup(int(descriptor))) as found:
                if found.getpeername()[1] == self.port:
                    found.shutdown(socket.SHUT_RDWR)
                    count += 1
        return count

    def start_ranks(self) -> list[Peers]:
        where = {"address": "127.0.0.1", "port": self.port, "agent_store": True}
        ranks = [Peers(self.connect, Launch(rank, 2, local_rank=rank, **where)) for rank in range(2)]
        for one in ranks:
            one.start()
        return ranks


@pytest.fixture
def agent() -> Iterator[Agent]:
    found = Agent()
    yield found
    found.process.kill()
    found.process.wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_end_of_an_agents_store_is_reported(agent: Agent, exits: Exits, number: signal.Signals) -> None:
    """The agent may run on another machine; nobody tells this machine's ranks of its end."""
    ranks = agent.start_ranks()
    time.sleep(5 * BEAT)
    agent.process.send_signal(number)
    losses = [one.loss() for one in ranks]
    told = f"the store of torchrun's agent (127.0.0.1:{agent.port}) has given no sign of life for 1 s"
    assert [str(loss) for loss in losses] == [told] * 2
    assert [loss.is_told for loss in losses] == [True, False]
    started = time.monotonic()
    for one, loss in zip(ranks, losses):
        one.leave(loss)
    assert time.monotonic() - started < 5


def test_reconnects_to_an_agents_store(agent: Agent, exits: Exits) -> None:
    ranks = agent.start_ranks()
    time.sleep(5 * BEAT)
    assert agent.break_connections() == 2
    time.sleep(30 * BEAT)
    ranks[0].leave(ValueError("no such thing"))
    assert "has failed, its own error says why" in str(ranks[1].loss())
    ranks[1].leave()


def test_a_rank_lost_while_the_group_is_formed_is_named(exits: Exits) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=1))
    first = make(server, 0, 2)
    with pytest.raises(PeerLostError, match="rank 1 was lost while the group was formed") as caught:
        first.start()
    assert caught.value.is_told
    first.leave(caught.value)


def test_work_that_takes_longer_than_its_limit_ends_the_process(
    store: dist.Store, exits: Exits, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = Peers(lambda: store, Launch())
    with alone.limit(5, "the group has not formed"):
        pass
    with alone.limit(0.1, "the group has not formed"):
        assert exits.happened.wait(5)
    assert exits.codes == [1] * len(exits.codes)
    assert "error: the group has not formed" in capsys.readouterr().err
