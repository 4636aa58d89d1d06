"""What a reader of files tells the store: how a data set is recognised, and how its images come, chunk by chunk.

A reader is a function from a config section to a `Source`. Making one only lists files; `read` opens them.

Shapes: S samples, C channels, H x W pixels, n samples of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import DataConfig

PREFETCH = "run `fedpeft prefetch CONFIG` on a machine with internet"


@dataclass(frozen=True)
class Part:
    """One split, as it is read."""

    shape: tuple[int, int, int, int]
    """(S, C, H, W)."""
    labels: np.ndarray
    """int64 [S]."""
    chunks: Callable[[], Iterator[np.ndarray]]
    """Starts reading: uint8 [n, C, H, W] each, all samples in order."""
    groups: np.ndarray | None = None
    """int64 [S]: whose sample it is, where that is known."""


@dataclass(frozen=True)
class Contents:
    """Both splits, ready to be read."""

    class_names: tuple[str, ...]
    train: Part
    test: Part
    texts: Mapping[str, str] = field(default_factory=dict)
    """File name to text: what else belongs beside the images, such as the lists of a random split."""
    cropped: bool = False
    """Whether images were resized on the shorter side and cropped, since their sizes differ."""
    notes: tuple[str, ...] = ()
    """Lines that a user should read once, when the store is built."""


@dataclass(frozen=True)
class Source:
    """A data set on this machine's disk."""

    identity: Any
    """What JSON can hold; it changes whenever the decoded images would."""
    read: Callable[[], Contents]
    """Raises ConfigError for a file that is not what it should be."""


def stamp(paths: Iterable[Path], root: Path) -> list[list[Any]]:
    """Names, sizes and times of change, by which files are recognised wherever they are moved to."""
    stats = [(path.relative_to(root).as_posix(), path.stat()) for path in paths]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def require_files(config: DataConfig, paths: Iterable[Path]) -> None:
    """
    Raises:
        ConfigError: some of these are not there.
    """
    missing = [path.relative_to(config.root).as_posix() for path in paths if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(
            f"data.name: {config.name!r} needs the file {missing[0]}{more} below data.root: '{config.root}', "
            f"and there is none; {PREFETCH}"
        )


def check_num_classes(key: str, expected: int, where: str, names: Iterable[str]) -> None:
    """
    Args:
        key: what says how many there should be, such as "data.classes: 10".

    Raises:
        ConfigError: another number of classes than expected.
    """
    names = list(names)
    if len(names) != expected:
        listed = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise ConfigError(f"{key} means {expected} classes, but {where} has {len(names)} ({listed or 'none'})")


def check_labels(labels: np.ndarray, num_classes: int, where: str) -> None:
    """
    Raises:
        ConfigError: no sample at all, or a label that is no class.
    """
    if not len(labels):
        raise ConfigError(f"data.root: {where} holds no sample")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise ConfigError(f"data.root: {where} holds the label {wrong}; valid are 0 to {num_classes - 1}")


def unreadable(
    path: Path | str,
    reason: Exception | str,
    remedy: str = "put a whole copy of the file there",
    key: str = "data.root",
) -> ConfigError:
    """The error for a file that is damaged, or something else than it should be."""
    text = " ".join(str(reason).split()) or type(reason).__name__
    return ConfigError(f"{key}: '{printable(path)}' cannot be read ({text[:200]}); {remedy}")


def printable(name: Path | str) -> str:
    """A file's name as text that can be encoded: bytes that are no UTF-8 stand as `\\x..`."""
    return str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
