"""How the ranks of a group find each other in a store that may still hold entries of earlier ranks.

torchrun keeps its store across restarts. On several machines, its agents do not even agree on the number of restarts:
an agent that restarts its ranks because another machine's have failed does not count that. So nothing that a launcher
says tells one attempt from the next.

Each rank writes down a random name instead. Rank 0 calls all names that it finds, again whenever one has changed. The
group meets once every called rank has answered.
"""

import json
import time
import uuid
from dataclasses import dataclass

import torch.distributed as dist

from fedpeft_dist.runtime.errors import PeerLostError

LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Meeting:
    """The facts that all ranks of a group agree on."""

    token: str
    """A name that no other group has."""
    restart: int
    """The largest of the ranks' numbers of restarts."""


def meet(store: dist.Store, rank: int, world_size: int, restart: int, seconds: float) -> Meeting:
    """Waits until every rank of this attempt, and of no earlier one, is here.

    Args:
        restart: how often this rank's launcher believes to have restarted it.
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
    """Calls all ranks by their names, unless the same names were called before."""
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
