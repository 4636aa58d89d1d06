"""Errors about weights, and other libraries' errors as one line."""

from __future__ import annotations

LONGEST = 300
"""Characters of an error's text that are kept."""


class UnfitWeightsError(ValueError):
    """Weights that cannot be used. The message goes on after the file's name: "lacks ...", "cannot be loaded ..."."""


def one_line(error: Exception) -> str:
    """An error's text on one line, cut if it is long; the error's class if it has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < LONGEST else text[:LONGEST] + "..."
