"""Paths that users give: a leading `~` is a home folder, as in a shell."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator


def expand_path(path: str) -> str:
    """
    Raises:
        ValueError: the home folder of a user who is not known here.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        name = path.partition("/")[0]
        raise ValueError(
            f"{path!r}: {name} is no user's home folder; give ~/..., a full path, or ./{name} for the name"
        )
    return expanded


UserPath = Annotated[str, AfterValidator(expand_path)]
"""The type of a config key that holds a path."""
