"""Ranks that meet in a store which earlier ones have used: threads on one store."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from fedpeft_dist.config.errors import PeerLostError
from fedpeft_dist.runtime.meeting import Meeting, meet


@pytest.fixture
def server() -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20))


def come(server: dist.Store, rank: int, world_size: int, restart: int = 0, seconds: float = 20) -> Future[Meeting]:
    """A rank with a connection of its own."""
    store = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=20))
    return ThreadPoolExecutor().submit(meet, store, rank, world_size, restart, seconds)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_all_ranks_meet_once(server: dist.Store, world_size: int) -> None:
    meetings = {rank.result() for rank in [come(server, rank, world_size) for rank in reversed(range(world_size))]}
    assert len(meetings) == 1
    again = {rank.result() for rank in [come(server, rank, world_size, 1) for rank in range(world_size)]}
    assert len(again) == 1
    assert meetings.pop().token != again.pop().token


def test_the_largest_restart_count_is_agreed_on(server: dist.Store) -> None:
    restarts = (0, 2, 1)
    found = {rank.result() for rank in [come(server, rank, 3, restart) for rank, restart in enumerate(restarts)]}
    assert [meeting.restart for meeting in found] == [2]


def test_a_late_rank_meets_the_waiting_ones_and_no_earlier_ones(server: dist.Store) -> None:
    """Rank 1 of the attempt before has died; its name is still there when the others come again."""
    before = {rank.result() for rank in [come(server, rank, 3) for rank in range(3)]}
    early = [come(server, 0, 3), come(server, 2, 3)]
    time.sleep(0.5)
    assert not any(rank.done() for rank in early)
    late = come(server, 1, 3, restart=1)
    assert len({rank.result() for rank in [*early, late]} | before) == 2


def test_a_rank_that_dies_while_others_wait_is_replaced(server: dist.Store) -> None:
    waiting = [come(server, 0, 3), come(server, 1, 3)]
    server.set("name/2", json.dumps(["a name that nobody bears any more", 0, ""]))
    time.sleep(0.5)
    assert not any(rank.done() for rank in waiting)
    assert len({rank.result() for rank in [*waiting, come(server, 2, 3)]}) == 1


def test_a_missing_rank_is_named(server: dist.Store) -> None:
    ranks = [come(server, rank, 4, seconds=1) for rank in (0, 2)]
    errors = [rank.exception() for rank in ranks]
    assert [str(error) for error in errors] == ["rank 1, 3 of 4 has not come in 1 s"] * 2
    assert all(isinstance(error, PeerLostError) for error in errors)
    assert [error.is_told for error in errors] == [True, False]
    assert threading.active_count() < 20


def test_every_rank_learns_where_the_others_compute(server: dist.Store) -> None:
    stores = [dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=20)) for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        coming = [pool.submit(meet, store, rank, 3, 0, 20, f"gpu {rank % 2}") for rank, store in enumerate(stores)]
    assert [rank.result().places for rank in coming] == [("gpu 0", "gpu 1", "gpu 0")] * 3
