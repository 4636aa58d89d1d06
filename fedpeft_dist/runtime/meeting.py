"""How the ranks of a group find each other: over the network, and in a store that may hold entries of earlier ranks.

torchrun keeps its store across restarts. On several machines, its agents do not even agree on the number of restarts:
an agent that restarts its ranks because another machine's have failed does not count that. So nothing that a launcher
says tells one attempt from the next.

Each rank writes down a random name instead. Rank 0 calls all names that it finds, again whenever one has changed. The
group meets once every called rank has answered.
"""

import json
import socket
import struct
import time
import uuid
from contextlib import suppress
from typing import NamedTuple

import torch.distributed as dist

from fedpeft_dist.config.errors import PeerLostError

LOOK_SECONDS = 0.05
_SIOCGIFADDR = 0x8915
"""Linux's request for an interface's IPv4 address."""


class Meeting(NamedTuple):
    """What all ranks of a group learn when they meet."""

    token: str
    """The group's name, which no other group has."""
    restart: int
    """The largest of the ranks' numbers of restarts."""
    places: tuple[str, ...]
    """Each rank's place, as it has told it."""


def meet(store: dist.Store, rank: int, world_size: int, restart: int, seconds: float, place: str = "") -> Meeting:
    """Waits until every rank of this attempt, and of no earlier one, is here.

    `restart` is how often this rank's launcher believes to have restarted it, `place` is where it computes. Raises
    PeerLostError if some rank has not come in that many seconds.
    """
    name, deadline = uuid.uuid4().hex, time.monotonic() + seconds
    names = [f"name/{other}" for other in range(world_size)]
    store.set(names[rank], json.dumps([name, restart, place]))
    token, called = "", []
    while time.monotonic() < deadline:
        if rank == 0 and store.check(names):
            found = [json.loads(value) for value in store.multi_get(names)]
            if found != called:
                token, called = uuid.uuid4().hex, found
                store.set("roster", json.dumps([token, called]))
            if store.check([f"answer/{token}/{other}" for other in range(1, world_size)] or ["roster"]):
                store.set(f"begin/{token}", "")
        elif rank and store.check(["roster"]):
            token, called = json.loads(store.get("roster"))
            if len(called) > rank and called[rank][0] == name:
                store.set(f"answer/{token}/{rank}", "")
        if called and called[rank:] and called[rank][0] == name and store.check([f"begin/{token}"]):
            _, restarts, places = zip(*called)
            return Meeting(token, max(restarts), places)
        time.sleep(LOOK_SECONDS)
    missing = [other for other in range(world_size) if not store.check([names[other]])]
    who = f"rank {', '.join(map(str, missing))}" if missing else "some rank"
    raise PeerLostError(f"{who} of {world_size} has not come in {seconds:.0f} s", is_told=rank == 0 or 0 in missing)


def interface_towards(address: str) -> str | None:
    """The interface by which this machine reaches an IPv4 address or host; None if the system does not tell.

    gloo would use the interface that this machine's own name resolves to: perhaps the loopback, or none.
    """
    with suppress(ImportError, OSError):
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing: it looks the route up
            own = socket.inet_aton(probe.getsockname()[0])
            for _, name in socket.if_nameindex():
                with suppress(OSError):  # one without an IPv4 address
                    if fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))[20:24] == own:
                        return name
    return None
