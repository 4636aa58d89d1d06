"""Which clients could be reached when a round starts. Only candidates are asked, so a round does not cost O(N).

Shapes: N clients, S candidates, K rows of a trace.
"""

import math
from typing import Protocol

import numpy as np
import torch

from fedpeft_dist.config import schema
from fedpeft_dist.lanes.random import derive_seed, fold_in, uniform, uniform_by_id
from fedpeft_dist.participation.traces import TraceFile

KEY = "federation.participation.availability.path"


class Availability(Protocol):
    share: float
    """Share of the population that is available on average."""
    most: int
    """Largest number of clients that can be available at once."""

    def of(self, clients: np.ndarray, round_number: int) -> np.ndarray:
        """Whether these clients, int64 [S], are available in a round, counted from 0: bool [S]."""


class OnOff:
    """Each client's rounds fall into stretches of equal length. A new draw decides each stretch."""

    def __init__(self, config: schema.OnOffAvailability, population: int, seed: int):
        self.config, self.seed = config, seed
        self.share, self.most = config.share, population

    def of(self, clients: np.ndarray, round_number: int) -> np.ndarray:
        config, ids = self.config, torch.from_numpy(clients)
        share = config.share + config.spread * (2 * uniform_by_id(clients, self.seed, "on-off share") - 1)
        shift = fold_in(torch.tensor(derive_seed(self.seed, "on-off shift")), ids) % config.rounds
        stretch = (shift + round_number) // config.rounds
        drawn = uniform(fold_in(fold_in(torch.tensor(derive_seed(self.seed, "on-off")), ids), stretch))
        return drawn.double().numpy() < share


class Diurnal:
    def __init__(self, config: schema.DiurnalAvailability, population: int, seed: int, seconds_per_round: float):
        self.config, self.seed, self.seconds_per_round = config, seed, seconds_per_round
        self.share, self.most = (config.low + config.high) / 2, population

    def of(self, clients: np.ndarray, round_number: int) -> np.ndarray:
        config = self.config
        begins = config.spread * uniform_by_id(clients, self.seed, "day begins")
        time_of_day = 2 * math.pi * (round_number * self.seconds_per_round / config.period - begins)
        probability = config.low + (config.high - config.low) * (1 - np.cos(time_of_day)) / 2
        return uniform_by_id(clients, self.seed, "diurnal", round_number) < probability


class Trace:
    """Intervals from a file. A client and a time become one integer, so a binary search finds the interval.

    Args:
        holders: the only clients that are ever asked, int64; None for all.

    Raises:
        ConfigError: the file cannot be read, names an unknown client, lacks a client, or has gaps or overlaps.
    """

    def __init__(
        self, config: schema.TraceAvailability, population: int, seconds_per_round: float, holders: np.ndarray | None
    ):
        self.seconds_per_round, file = seconds_per_round, TraceFile(KEY, config.path)
        columns = {"client": "i8", "start": "f8", "end": "f8", "available": "i8"}
        rows = file.read(columns, population, every_client=True)
        rows = rows[np.lexsort((rows["start"], rows["client"]))]
        _check_intervals(file, rows)
        if holders is not None:
            rows, population = rows[np.isin(rows["client"], holders)], len(holders)
        self.length = float(rows["end"][-1])
        on = rows["available"] == 1
        # A time is replaced by its rank among all starts, so the search compares integers and is exact.
        self.times, ranks = np.unique(rows["start"], return_inverse=True)
        self.starts, self.on = rows["client"] * len(self.times) + ranks, on
        goes_off = np.searchsorted(self.times, rows["end"][on])
        steps = np.bincount(ranks[on], minlength=len(self.times) + 1)
        steps -= np.bincount(goes_off, minlength=len(self.times) + 1)
        self.most = int(np.cumsum(steps).max())
        self.share = float((rows["end"] - rows["start"])[on].sum() / (population * self.length))

    def of(self, clients: np.ndarray, round_number: int) -> np.ndarray:
        time = math.fmod(round_number * self.seconds_per_round, self.length)
        rank = np.searchsorted(self.times, time, side="right") - 1
        return self.on[np.searchsorted(self.starts, clients * len(self.times) + rank, side="right") - 1]


def make_availability(
    config: schema.ParticipationConfig, population: int, seed: int, holders: np.ndarray | None
) -> Availability | None:
    """The availability that a config describes; None if all clients are always available.

    Args:
        holders: the clients that have samples, int64; None for all. A trace's `most` and `share` count these clients.
    """
    match config.availability:
        case schema.OnOffAvailability() as on_off:
            return OnOff(on_off, population, seed)
        case schema.DiurnalAvailability() as diurnal:
            return Diurnal(diurnal, population, seed, config.seconds_per_round)
        case schema.TraceAvailability() as trace:
            return Trace(trace, population, config.seconds_per_round, holders)
    return None


def _check_intervals(file: TraceFile, rows: np.ndarray) -> None:
    """Checks rows [K] that are sorted by client and start."""
    clients, starts, ends = rows["client"], rows["start"], rows["end"]
    same = clients[1:] == clients[:-1]
    first, last = np.append(True, ~same), np.append(~same, True)
    following = np.append(starts[1:], np.nan)
    length = ends[last].max()
    checks = (
        (~np.isin(rows["available"], (0, 1)), "available is {available}; give 0 or 1"),
        (~(np.isfinite(starts) & np.isfinite(ends) & (ends > starts)), "an interval should end after it starts"),
        (first & (starts != 0), "the client's first interval is missing; it should start at 0"),
        (~last & (following < ends), "it overlaps with the client's next interval, which starts at {following}"),
        (~last & (following > ends), "a gap follows: the client's next interval starts at {following}"),
        (last & (ends != length), "the client's last interval should end at {length}, as for the other clients"),
    )
    for wrong, message in checks:
        found = np.flatnonzero(wrong)
        if len(found):
            n = found[0]
            told = message.format(available=rows["available"][n], following=f"{following[n]:g}", length=f"{length:g}")
            raise file.error(f"is wrong at client {clients[n]}, seconds {starts[n]:g} to {ends[n]:g}: {told}")
