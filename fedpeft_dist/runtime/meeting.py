"""How the ranks of a group find each other in a store that may hold what earlier ranks have left.

torchrun keeps its store across restarts. On several machines its agents do not even agree on how many there were: one
that starts its ranks again only because another machine's have failed does not count that. So nothing that a launcher
says tells one attempt from the next. Each rank comes under a name of its own instead, rank 0 calls all of the names
that it finds, again whenever one has changed, and the group meets once everyone has answered.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass

import torch.distributed as dist

from fedpeft_dist.runtime.errors import PeerLostError

LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Meeting:
    """What all ranks of a group agree on."""

    token: str
    """No other group's."""
    restart: int
    """The largest of the ranks' counts."""


def meet(store: dist.Store, rank: int, world_size: int, restart: int, seconds: float) -> Meeting:
    """Waits until every rank is here, of this attempt and no earlier one.

    Args:
        restart: how often this rank's launcher has started it again, as far as it knows.
        seconds: how long to wait.

    Raises:
        PeerLostError: some rank has not come in that time.
    """
    name, deadline = uuid.uuid4().hex, time.monotonic() + seconds
    store.set(f"name/{rank}", json.dumps([name, restart]))
    token, called = "", None
    while time.monotonic() < deadline:
        if rank == 0:
            token, called = _call(store, world_size, token, called)
            if token and store.check([f"answer/{token}/{other}" for other in range(1, world_size)] or ["roster"]):
                store.set(f"begin/{token}", "")
                return _meeting(token, called)
        elif store.check(["roster"]):
            token, called = json.loads(store.get("roster"))
            if len(called) > rank and called[rank][0] == name:
                store.set(f"answer/{token}/{rank}", "")
                if store.check([f"begin/{token}"]):
                    return _meeting(token, called)
        time.sleep(LOOK_SECONDS)
    missing = [other for other in range(world_size) if not store.check([f"name/{other}"])]
    who = f"rank {', '.join(map(str, missing))}" if missing else "some rank"
    raise PeerLostError(f"{who} of {world_size} has not come in {seconds:.0f} s", is_told=rank == 0 or 0 in missing)


def _call(store: dist.Store, world_size: int, token: str, called: list | None) -> tuple[str, list | None]:
    """Calls the names of all ranks where they are not those called before."""
    keys = [f"name/{rank}" for rank in range(world_size)]
    if not store.check(keys):
        return token, called
    found = [json.loads(value) for value in store.multi_get(keys)]
    if found != called:
        token = uuid.uuid4().hex
        store.set("roster", json.dumps([token, found]))
    return token, found


def _meeting(token: str, called: list) -> Meeting:
    return Meeting(token, max(restart for _, restart in called))
