"""Errors of other libraries, fit to stand inside one line of this package's own."""

from __future__ import annotations

from fedpeft_dist.config import errors

LONGEST = 300


class UnfitWeightsError(ValueError):
    """Weights that cannot be used. The message follows the name of their file: "lacks ...", "cannot be loaded ..."."""


def one_line(error: Exception) -> str:
    """What an error says, on one line and cut if it is long; its class if it says nothing."""
    return errors.one_line(error, LONGEST)
