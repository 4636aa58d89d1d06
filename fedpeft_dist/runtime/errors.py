"""Errors of a group of ranks."""

from __future__ import annotations

from fedpeft_dist.config.errors import ConfigError


class FirstToldError(ConfigError):
    """The user's mistake, found on one rank or more of a group, of which this one is to tell."""


class ToldElsewhereError(ConfigError):
    """The user's mistake, found on another rank or on this one too, of which another rank tells."""


class PeerLostError(RuntimeError):
    """Another rank, or the store of all of them, has died, failed or fallen silent, so that this one cannot go on.

    Args:
        is_told: whether this rank is the one to tell it; the others end without a word.
    """

    def __init__(self, message: str, is_told: bool):
        super().__init__(message)
        self.is_told = is_told
