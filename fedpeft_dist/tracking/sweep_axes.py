"""sweep.json: the choice of a sweep's cell on each axis of its sweep. A report takes its axes from this file."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.runtime.files import write_text
from fedpeft_dist.tracking.run_directory import read_json

FILE_NAME = "sweep.json"


@dataclass(frozen=True)
class AxisChoice:
    """A cell's place on one axis."""

    name: str
    """The choice's name, as in the cell's name."""
    keys: tuple[str, ...]
    """The dotted config keys that the choice sets."""


def write_axes(folder: Path, axes: Mapping[str, AxisChoice]) -> None:
    """Writes a cell's choices by axis into its run's directory."""
    content = {"axes": {name: asdict(choice) for name, choice in axes.items()}}
    write_text(folder / FILE_NAME, json.dumps(content) + "\n")


def read_axes(folder: Path) -> dict[str, AxisChoice]:
    """A run's choices by axis; empty for a run that is no sweep's cell.

    Raises:
        ConfigError: the file cannot be read.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return {}
    try:
        found = read_json(path, "axes")["axes"].items()
        return {name: AxisChoice(choice["name"], tuple(choice["keys"])) for name, choice in found}
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read as the axes of a sweep's cell ({error!r})") from None
