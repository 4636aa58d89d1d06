"""A data set of a config: its number of classes, how it is loaded, and how its files are fetched.

A data set is one class in a file of its own, one line in DATASETS (`data/__init__.py`) and one section in
`config/schema/data.py`. Everything else asks the class.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft_dist.config.errors import ConfigError, one_line
from fedpeft_dist.config.schema import DataSection
from fedpeft_dist.data.datasets import Contents, Dataset
from fedpeft_dist.data.image_store import ImageStore

PREFETCH = "run `fedpeft prefetch CONFIG` on a machine with internet"


class DataSource(ABC):
    """A data set as one config section describes it. Making a source reads nothing.

    Every method may raise ConfigError, if the config does not fit the data or files are missing or damaged.
    """

    def __init__(self, config: DataSection):
        self.config = config

    @abstractmethod
    def num_classes(self) -> int:
        """The number of classes, found without reading an image."""

    @abstractmethod
    def load(self, seed: int) -> Dataset:
        """Both splits, decoded. Only data that is made at random depends on the seed."""

    def prefetch(self) -> Path | None:
        """Fetches and decodes the data set.

        Returns:
            The folder of the decoded images; None if there are no files to fetch.
        """
        return None


class FileSource(DataSource):
    """A data set of files. They are decoded once, into a store on disk."""

    @abstractmethod
    def identity(self) -> Any:
        """A JSON value that changes whenever the decoded images would. Lists the files and opens none."""

    @abstractmethod
    def read(self) -> Contents:
        """Opens the files."""

    def download(self) -> None:
        """Fetches the files that are missing. Does nothing for files that users must put in place by hand."""

    @cached_property
    def store(self) -> ImageStore:
        root = Path(self.config.store) if self.config.store is not None else Path(self.config.root) / ".store"
        return ImageStore(root, self.config.name, self.identity())

    def load(self, seed: int) -> Dataset:
        return self.store.load(self.read)

    def prefetch(self) -> Path:
        self.download()
        self.load(seed=0)
        return self.store.folder


def stamp(paths: Iterable[Path], root: Path) -> list[list[Any]]:
    """The name below root, the size and the time of change of each file. Moving the files changes none of them."""
    stats = [(path.relative_to(root).as_posix(), path.stat()) for path in paths]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def check_num_classes(key: str, expected: int, where: str, names: Iterable[str]) -> None:
    """
    Args:
        key: the key and value that say how many classes to expect, such as "data.classes: 10".

    Raises:
        ConfigError: the number of classes is another one.
    """
    names = list(names)
    if len(names) != expected:
        listed = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise ConfigError(f"{key} means {expected} classes, but {where} has {len(names)} ({listed or 'none'})")


def check_labels(labels: np.ndarray, num_classes: int, where: str) -> None:
    """
    Raises:
        ConfigError: there is no sample, or a label outside 0 .. num_classes - 1.
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
    """The error for a file that is damaged or has other contents than expected."""
    return ConfigError(f"{key}: '{printable(path)}' cannot be read ({one_line(reason, 200)}); {remedy}")


def printable(name: Path | str) -> str:
    """A file's name as text that can be encoded: bytes that are not UTF-8 become `\\x..`."""
    return str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
