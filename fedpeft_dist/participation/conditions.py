"""The conditions of clients: who could be reached when a round starts, who is lost in it, and how fast each works.

Only candidates are asked whether they are available, so a round does not cost O(N).

Shapes: N clients, S of them, K rows of a trace.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from fedpeft_dist.config import schema
from fedpeft_dist.lanes.random import derive_seed, fold_in, uniform, uniform_by_id
from fedpeft_dist.participation.traces import TraceFile

MOMENTS = ("before", "during", "after")
STAYS = np.inf
"""The progress of a client that is not lost."""


@dataclass
class Availability:
    share: float
    """Share of the population that is available on average."""
    most: int
    """Largest number of clients that can be available at once."""
    of: Callable[[np.ndarray, int], np.ndarray]
    """Whether some clients, int64 [S], are available in a round, counted from 0: bool [S]."""


def make_availability(
    config: schema.ParticipationConfig, population: int, seed: int, holders: np.ndarray | None
) -> Availability | None:
    """The availability that a config describes; None if all clients are always available.

    Args:
        holders: the clients that have samples, int64; None for all. A trace's `most` and `share` count these clients.

    Raises:
        ConfigError: a trace cannot be read, names an unknown client, lacks a client, or has gaps or overlaps.
    """
    match config.availability:
        case schema.OnOffAvailability() as on_off:
            return Availability(on_off.share, population, _on_off(on_off, seed))
        case schema.DiurnalAvailability() as diurnal:
            share = (diurnal.low + diurnal.high) / 2
            return Availability(share, population, _diurnal(diurnal, seed, config.seconds_per_round))
        case schema.TraceAvailability(path=path):
            return _trace_availability(TraceFile("availability", path), population, config.seconds_per_round, holders)
    return None


def _on_off(config: schema.OnOffAvailability, seed: int) -> Callable[[np.ndarray, int], np.ndarray]:
    """Each client's rounds fall into stretches of equal length. A new draw decides each stretch."""

    def of(clients: np.ndarray, round_number: int) -> np.ndarray:
        ids = torch.from_numpy(clients)
        share = config.share + config.spread * (2 * uniform_by_id(clients, seed, "on-off share") - 1)
        shift = fold_in(torch.tensor(derive_seed(seed, "on-off shift")), ids) % config.rounds
        stretch = (shift + round_number) // config.rounds
        drawn = uniform(fold_in(fold_in(torch.tensor(derive_seed(seed, "on-off")), ids), stretch))
        return drawn.double().numpy() < share

    return of


def _diurnal(config: schema.DiurnalAvailability, seed: int, seconds: float) -> Callable[[np.ndarray, int], np.ndarray]:
    def of(clients: np.ndarray, round_number: int) -> np.ndarray:
        begins = config.spread * uniform_by_id(clients, seed, "day begins")
        time_of_day = 2 * math.pi * (round_number * seconds / config.period - begins)
        probability = config.low + (config.high - config.low) * (1 - np.cos(time_of_day)) / 2
        return uniform_by_id(clients, seed, "diurnal", round_number) < probability

    return of


def _trace_availability(file: TraceFile, population: int, seconds: float, holders: np.ndarray | None) -> Availability:
    """Intervals from a file. A client and a time become one integer, so a binary search finds the interval."""
    columns = {"client": "i8", "start": "f8", "end": "f8", "available": "i8"}
    rows = file.read(columns, population, every_client=True)
    rows = rows[np.lexsort((rows["start"], rows["client"]))]
    _check_intervals(file, rows)
    if holders is not None:
        rows, population = rows[np.isin(rows["client"], holders)], len(holders)
    length, on = float(rows["end"][-1]), rows["available"] == 1
    # A time is replaced by its rank among all starts, so the search compares integers and is exact.
    times, ranks = np.unique(rows["start"], return_inverse=True)
    starts = rows["client"] * len(times) + ranks
    goes_off = np.searchsorted(times, rows["end"][on])
    steps = np.bincount(ranks[on], minlength=len(times) + 1) - np.bincount(goes_off, minlength=len(times) + 1)

    def of(clients: np.ndarray, round_number: int) -> np.ndarray:
        rank = np.searchsorted(times, math.fmod(round_number * seconds, length), side="right") - 1
        return on[np.searchsorted(starts, clients * len(times) + rank, side="right") - 1]

    share = (rows["end"] - rows["start"])[on].sum() / (population * length)
    return Availability(float(share), int(np.cumsum(steps).max()), of)


def _check_intervals(file: TraceFile, rows: np.ndarray) -> None:
    """Checks rows [K] that are sorted by client and start."""
    clients, starts, ends = rows["client"], rows["start"], rows["end"]
    same = clients[1:] == clients[:-1]
    first, last = np.append(True, ~same), np.append(~same, True)
    following, length = np.append(starts[1:], np.nan), ends[last].max()
    checks = (
        (~np.isin(rows["available"], (0, 1)), "available is {available}; give 0 or 1"),
        (~(np.isfinite(starts) & np.isfinite(ends) & (ends > starts)), "an interval should end after it starts"),
        (first & (starts != 0), "the client's first interval is missing; it should start at 0"),
        (~last & (following < ends), "it overlaps with the client's next interval, which starts at {following:g}"),
        (~last & (following > ends), "a gap follows: the client's next interval starts at {following:g}"),
        (last & (ends != length), "the client's last interval should end at {length:g}, as for the other clients"),
    )
    for wrong, message in checks:
        if wrong.any():
            n = wrong.argmax()
            told = message.format(available=rows["available"][n], following=following[n], length=length)
            raise file.error(f"is wrong at client {clients[n]}, seconds {starts[n]:g} to {ends[n]:g}: {told}")


class Dropout:
    """The clients that are lost, as a config describes it.

    Raises:
        ConfigError: a trace cannot be read, names an unknown client, round or moment, or loses a client twice in a
            round.
    """

    def __init__(self, config: schema.DropoutConfig, population: int, seed: int):
        self.config, self.population, self.seed = config, population, seed
        if config.name == "trace":
            self.losses, self.moments = _read_losses(TraceFile("dropout", config.path), population)

    def progress(self, clients: np.ndarray, round_number: int) -> np.ndarray:
        """The share of its local steps after which each of these clients, int64 [S], is lost in a round.

        Returns:
            float64 [S]: 0 before local training, 1 after it, a number between for a loss during it; STAYS for no loss.
        """
        config, stays = self.config, np.full(len(clients), STAYS)
        if config.name == "none":
            return stays
        if config.name == "random":
            bounds = np.cumsum([config.before, config.during, config.after])
            drawn = uniform_by_id(clients, self.seed, "client dropout", round_number)
            moments = np.searchsorted(bounds, drawn, side="right")
        else:
            wanted = round_number * self.population + clients
            places = np.minimum(np.searchsorted(self.losses, wanted), len(self.losses) - 1)
            moments = np.where(self.losses[places] == wanted, self.moments[places], len(MOMENTS))
        during = uniform_by_id(clients, self.seed, "dropout progress", round_number)
        return np.choose(moments, [np.zeros(len(clients)), during, np.ones(len(clients)), stays])


def _read_losses(file: TraceFile, population: int) -> tuple[np.ndarray, np.ndarray]:
    """Round and client of each loss as one integer, ascending, and the index of its moment: int64 [K] each."""
    # One character more than the longest moment, so that a longer word is not cut to a valid one.
    rows = file.read({"round": "i8", "client": "i8", "when": "U7"}, population)
    if (early := rows["round"][rows["round"] < 1]).size:
        raise file.error(f"names round {early[0]}; rounds are counted from 1")
    words = np.char.strip(rows["when"])
    if (unknown := words[~np.isin(words, MOMENTS)]).size:
        raise file.error(f"is wrong: when is {str(unknown[0])!r}; give {', '.join(MOMENTS)}")
    losses = (rows["round"] - 1) * population + rows["client"]
    order = np.argsort(losses, kind="stable")
    losses, moments = losses[order], np.select([words == m for m in MOMENTS], range(3))[order]
    if (repeated := losses[1:][losses[1:] == losses[:-1]]).size:
        number, client = divmod(int(repeated[0]), population)
        raise file.error(f"loses client {client} twice in round {number + 1}; give one row")
    return losses, moments


class Devices(NamedTuple):
    """Speeds above 0 of all clients, float64 [N], or of one client. Infinite speeds take no simulated time."""

    samples_per_second: np.ndarray | float
    uplink_bytes_per_second: np.ndarray | float
    downlink_bytes_per_second: np.ndarray | float

    def of(self, clients: np.ndarray) -> "list[Devices]":
        """The speeds of each of some clients, int64 [S]."""
        return list(map(Devices, *(column[clients].tolist() for column in self)))


def make_devices(config: schema.DevicesConfig, population: int, seed: int) -> Devices:
    """The devices that a config describes.

    Raises:
        ConfigError: a trace cannot be read, lacks a client, names an unknown one, or holds a speed that is not above 0.
    """
    if config.name == "none":
        return Devices(*[np.broadcast_to(math.inf, (population,))] * 3)  # one number in memory
    if config.name == "trace":
        return _trace_devices(TraceFile("devices", config.path), population)
    compute, link = (
        np.exp(sigma * np.random.default_rng(derive_seed(seed, purpose)).standard_normal(population))
        for purpose, sigma in (("device compute", config.compute_sigma), ("device link", config.bandwidth_sigma))
    )
    speeds = zip(Devices._fields, (compute, link, link))
    return Devices(*(getattr(config, name) * factor for name, factor in speeds))


def _trace_devices(file: TraceFile, population: int) -> Devices:
    rows = file.read({"client": "i8", **dict.fromkeys(Devices._fields, "f8")}, population, every_client=True)
    clients = rows["client"]
    if len(rows) > population:
        repeated = int(np.bincount(clients).argmax())
        raise file.error(f"has more than one row for client {repeated}; give one row for each client")
    for name in Devices._fields:
        if (wrong := ~(np.isfinite(rows[name]) & (rows[name] > 0))).any():
            n = wrong.argmax()
            raise file.error(f"is wrong: {name} of client {clients[n]} is {rows[name][n]:g}; give one above 0")
    rows = rows[np.argsort(clients)]
    return Devices(*(np.ascontiguousarray(rows[name]) for name in Devices._fields))
