"""How fast each client receives, trains and sends, for the whole run.

Shapes: N clients, S of them.
"""

import math
from typing import NamedTuple

import numpy as np

from fedpeft_dist.config import schema
from fedpeft_dist.lanes.random import derive_seed
from fedpeft_dist.participation.traces import TraceFile

KEY = "federation.participation.devices.path"


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
    match config:
        case schema.LognormalDevices():
            return _lognormal(config, population, seed)
        case schema.TraceDevices():
            return _trace(TraceFile(KEY, config.path), population)
    instant = np.broadcast_to(math.inf, (population,))  # one number in memory
    return Devices(instant, instant, instant)


def _lognormal(config: schema.LognormalDevices, population: int, seed: int) -> Devices:
    compute, link = (
        np.exp(sigma * np.random.default_rng(derive_seed(seed, purpose)).standard_normal(population))
        for purpose, sigma in (("device compute", config.compute_sigma), ("device link", config.bandwidth_sigma))
    )
    return Devices(
        config.samples_per_second * compute,
        config.uplink_bytes_per_second * link,
        config.downlink_bytes_per_second * link,
    )


def _trace(file: TraceFile, population: int) -> Devices:
    rows = file.read({"client": "i8", **dict.fromkeys(Devices._fields, "f8")}, population, every_client=True)
    clients = rows["client"]
    if len(rows) > population:
        repeated = int(np.bincount(clients).argmax())
        raise file.error(f"has more than one row for client {repeated}; give one row for each client")
    for name in Devices._fields:
        wrong = np.flatnonzero(~(np.isfinite(rows[name]) & (rows[name] > 0)))
        if len(wrong):
            value, client = rows[name][wrong[0]], clients[wrong[0]]
            raise file.error(f"is wrong: {name} of client {client} is {value:g}; give one above 0")
    rows = rows[np.argsort(clients)]
    return Devices(*(np.ascontiguousarray(rows[name]) for name in Devices._fields))
