"""Which selected clients are lost in a round, and how far they get: before, during or after their local training.

Shapes: S selected clients.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from fedpeft_dist.config import schema
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.lanes.random import derive_seed, fold_in, uniform
from fedpeft_dist.participation.traces import check_clients, read_columns

KEY = "federation.participation.dropout.path"
MOMENTS = ("before", "during", "after")
STAYS = np.inf


class Dropout(Protocol):
    def progress(self, clients: np.ndarray, round_number: int) -> np.ndarray:
        """The share of its local steps after which each of these clients, int64 [S], is lost in a round.

        Returns:
            float64 [S]: 0 is lost before local training, 1 after it, what lies between during it; STAYS is not lost.
        """


class NoDropout:
    def progress(self, clients: np.ndarray, round_number: int) -> np.ndarray:
        return np.full(len(clients), STAYS)


class RandomDropout:
    def __init__(self, config: schema.RandomDropout, seed: int):
        self.bounds = np.cumsum([config.before, config.during, config.after])
        self.seed = seed

    def progress(self, clients: np.ndarray, round_number: int) -> np.ndarray:
        drawn = _uniform(self.seed, "client dropout", round_number, clients)
        moments = np.searchsorted(self.bounds, drawn, side="right")
        return _progress(moments, self.seed, round_number, clients)


class TraceDropout:
    """
    Raises:
        ConfigError: a file that cannot be read, unknown clients, rounds or moments, a client lost twice in a round.
    """

    def __init__(self, config: schema.TraceDropout, population: int, seed: int):
        path, self.population, self.seed = config.path, population, seed
        # A character more than the longest moment, so that a longer word is not cut to one.
        rows = read_columns(path, {"round": "i8", "client": "i8", "when": "U7"}, KEY)
        check_clients(path, rows["client"], population, KEY)
        if (early := rows["round"][rows["round"] < 1]).size:
            raise ConfigError(f"{KEY}: '{path}' names round {early[0]}; rounds are counted from 1")
        words = np.char.strip(rows["when"])
        if (unknown := words[~np.isin(words, MOMENTS)]).size:
            raise ConfigError(f"{KEY}: '{path}': when is {str(unknown[0])!r}; give {', '.join(MOMENTS)}")
        losses = (rows["round"] - 1) * population + rows["client"]
        order = np.argsort(losses, kind="stable")
        self.losses, self.moments = losses[order], np.select([words == m for m in MOMENTS], range(3))[order]
        twice = np.flatnonzero(self.losses[1:] == self.losses[:-1])
        if len(twice):
            number, client = divmod(int(self.losses[twice[0]]), population)
            raise ConfigError(f"{KEY}: '{path}' loses client {client} twice in round {number + 1}; give one row")

    def progress(self, clients: np.ndarray, round_number: int) -> np.ndarray:
        wanted = round_number * self.population + clients
        places = np.minimum(np.searchsorted(self.losses, wanted), len(self.losses) - 1)
        moments = np.where(self.losses[places] == wanted, self.moments[places], len(MOMENTS))
        return _progress(moments, self.seed, round_number, clients)


def make_dropout(config: schema.DropoutConfig, population: int, seed: int) -> Dropout:
    match config:
        case schema.RandomDropout():
            return RandomDropout(config, seed)
        case schema.TraceDropout():
            return TraceDropout(config, population, seed)
    return NoDropout()


def _progress(moments: np.ndarray, seed: int, round_number: int, clients: np.ndarray) -> np.ndarray:
    """The shares of moments by their index, one past the last for staying; where `during` is, is drawn."""
    drawn = _uniform(seed, "dropout progress", round_number, clients)
    return np.choose(moments, [np.zeros(len(clients)), drawn, np.ones(len(clients)), np.full(len(clients), STAYS)])


def _uniform(seed: int, purpose: str, round_number: int, clients: np.ndarray) -> np.ndarray:
    keys = fold_in(torch.tensor(derive_seed(seed, purpose, round_number)), torch.from_numpy(clients))
    return uniform(keys).double().numpy()
