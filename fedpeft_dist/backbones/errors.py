"""Errors of other libraries, fit to stand inside one line of this package's own."""

from __future__ import annotations

LONGEST = 300


class UnfitWeightsError(ValueError):
    """Weights that cannot be used. The message follows the name of their file: "lacks ...", "cannot be loaded ..."."""


def one_line(error: Exception) -> str:
    """What an error says, on one line and cut where it goes on for long; its class where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < LONGEST else text[:LONGEST] + "..."
