"""How fast each client receives, trains and sends, for the whole run.

Shapes: N clients, S of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

from fedpeft_dist.config import schema
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.lanes.random import derive_seed
from fedpeft_dist.participation.traces import check_all_present, check_clients, read_columns

KEY = "federation.participation.devices.path"


@dataclass(frozen=True)
class Devices:
    """float64 [N] each, above 0; infinite where nothing takes simulated time."""

    samples_per_second: np.ndarray
    uplink_bytes_per_second: np.ndarray
    downlink_bytes_per_second: np.ndarray

    def of(self, clients: np.ndarray) -> list[list[float]]:
        """The three of some clients, int64 [S]: S numbers each, in the order above."""
        return [getattr(self, field.name)[clients].tolist() for field in fields(self)]


def make_devices(config: schema.DevicesConfig, population: int, seed: int) -> Devices:
    """
    Raises:
        ConfigError: a trace that cannot be read, that lacks clients or has unknown ones, or speeds that are none.
    """
    match config:
        case schema.LognormalDevices():
            return _lognormal(config, population, seed)
        case schema.TraceDevices():
            return _trace(config.path, population)
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


def _trace(path: str, population: int) -> Devices:
    speeds = [field.name for field in fields(Devices)]
    rows = read_columns(path, {"client": "i8", **dict.fromkeys(speeds, "f8")}, KEY)
    clients = rows["client"]
    check_clients(path, clients, population, KEY)
    check_all_present(path, clients, population, KEY)
    if len(rows) > population:
        twice = int(np.bincount(clients).argmax())
        raise ConfigError(f"{KEY}: '{path}' has more than one row for client {twice}; give one row for each client")
    for name in speeds:
        wrong = np.flatnonzero(~(np.isfinite(rows[name]) & (rows[name] > 0)))
        if len(wrong):
            value = rows[name][wrong[0]]
            raise ConfigError(f"{KEY}: '{path}': {name} of client {clients[wrong[0]]} is {value:g}; give one above 0")
    rows = rows[np.argsort(clients)]
    return Devices(*(np.ascontiguousarray(rows[name]) for name in speeds))
