"""Errors of a group of ranks."""

from fedpeft_dist.config.errors import ConfigError


class FirstToldError(ConfigError):
    """The user's mistake, found on at least one rank of a group. This rank prints it."""


class ToldElsewhereError(ConfigError):
    """The user's mistake, found on at least one rank of a group. Another rank prints it."""


class PeerLostError(RuntimeError):
    """Another rank, or the group's store, has died, failed or fallen silent, so that this rank cannot go on.

    Args:
        is_told: whether this rank prints the error; the others end silently.
    """

    def __init__(self, message: str, is_told: bool):
        super().__init__(message)
        self.is_told = is_told
