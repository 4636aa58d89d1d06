"""Errors about weights, and other libraries' errors as one line."""

from fedpeft_dist.config import errors

LONGEST = 300
"""Characters of an error's text that are kept."""


class UnfitWeightsError(ValueError):
    """Weights that cannot be used. The message goes on after the file's name: "lacks ...", "cannot be loaded ..."."""


def one_line(error: Exception) -> str:
    """What an error says, on one line and cut if it is long; its class if it says nothing."""
    return errors.one_line(error, LONGEST)
