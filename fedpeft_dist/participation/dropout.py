"""Which selected clients are lost in a round, and how far each gets: before, during or after its local training.

Shapes: S selected clients.
"""

from typing import Protocol

import numpy as np

from fedpeft_dist.config import schema
from fedpeft_dist.lanes.random import uniform_by_id
from fedpeft_dist.participation.traces import TraceFile

KEY = "federation.participation.dropout.path"
MOMENTS = ("before", "during", "after")
STAYS = np.inf
"""The progress of a client that is not lost."""


class Dropout(Protocol):
    def progress(self, clients: np.ndarray, round_number: int) -> np.ndarray:
        """The share of its local steps after which each of these clients, int64 [S], is lost in a round.

        Returns:
            float64 [S]: 0 before local training, 1 after it, a number between for a loss during it; STAYS for no loss.
        """


class NoDropout:
    def progress(self, clients: np.ndarray, round_number: int) -> np.ndarray:
        return np.full(len(clients), STAYS)


class RandomDropout:
    def __init__(self, config: schema.RandomDropout, seed: int):
        self.bounds = np.cumsum([config.before, config.during, config.after])
        self.seed = seed

    def progress(self, clients: np.ndarray, round_number: int) -> np.ndarray:
        drawn = uniform_by_id(clients, self.seed, "client dropout", round_number)
        moments = np.searchsorted(self.bounds, drawn, side="right")
        return _progress(moments, self.seed, round_number, clients)


class TraceDropout:
    """A file names the clients that are lost.

    Raises:
        ConfigError: the file cannot be read, names an unknown client, round or moment, or loses a client twice in a
            round.
    """

    def __init__(self, config: schema.TraceDropout, population: int, seed: int):
        file, self.population, self.seed = TraceFile(KEY, config.path), population, seed
        # One character more than the longest moment, so that a longer word is not cut to a valid one.
        rows = file.read({"round": "i8", "client": "i8", "when": "U7"}, population)
        if (early := rows["round"][rows["round"] < 1]).size:
            raise file.error(f"names round {early[0]}; rounds are counted from 1")
        words = np.char.strip(rows["when"])
        if (unknown := words[~np.isin(words, MOMENTS)]).size:
            raise file.error(f"is wrong: when is {str(unknown[0])!r}; give {', '.join(MOMENTS)}")
        losses = (rows["round"] - 1) * population + rows["client"]
        order = np.argsort(losses, kind="stable")
        self.losses, self.moments = losses[order], np.select([words == m for m in MOMENTS], range(3))[order]
        repeated = np.flatnonzero(self.losses[1:] == self.losses[:-1])
        if len(repeated):
            number, client = divmod(int(self.losses[repeated[0]]), population)
            raise file.error(f"loses client {client} twice in round {number + 1}; give one row")

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
    """The progress for each moment, given by its index in MOMENTS; the index after the last one means no loss."""
    drawn = uniform_by_id(clients, seed, "dropout progress", round_number)
    return np.choose(moments, [np.zeros(len(clients)), drawn, np.ones(len(clients)), np.full(len(clients), STAYS)])
