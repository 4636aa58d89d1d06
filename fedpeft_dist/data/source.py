"""A data set of a config: its number of classes, how it is loaded, and how its files are fetched.

A data set is one class in a file of its own, one line in DATASETS (`data/__init__.py`) and one section in
`config/schema/data.py`. Everything else asks the class.
"""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from filelock import FileLock

from fedpeft_dist.config.errors import ConfigError, one_line
from fedpeft_dist.config.schema import DataSection
from fedpeft_dist.data.datasets import Contents, Dataset
from fedpeft_dist.data.image_store import ImageStore

PREFETCH = "run `fedpeft prefetch CONFIG` on a machine with internet"


class DataSource(ABC):
    """A data set as one config section describes it. Making a source reads nothing.

    Every method may raise ConfigError, if the config does not fit the data or files are missing or damaged.
    """

    classes: ClassVar[int | None] = None
    """The number of classes, if it is always the same."""
    num_train: ClassVar[int | None] = None
    """The number of training samples, if it is always the same."""

    def __init__(self, config: DataSection):
        self.config = config

    def num_classes(self) -> int:
        """The number of classes, found without reading an image."""
        return self.classes

    @abstractmethod
    def load(self, seed: int) -> Dataset:
        """Both splits, decoded. Only data that is made at random depends on the seed."""

    def prefetch(self) -> Path | None:
        """Fetches and decodes the data set. Returns the decoded images' folder; None if there are no files to fetch."""
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

    @property
    def root(self) -> Path:
        return Path(self.config.root)

    @property
    def store_root(self) -> Path:
        """The folder of all stores."""
        return self.root / ".store" if self.config.store is None else Path(self.config.store)

    @cached_property
    def store(self) -> ImageStore:
        return ImageStore(self.store_root, self.config.name, self.identity())

    def load(self, seed: int) -> Dataset:
        return self.store.load(self.read)

    def prefetch(self) -> Path:
        self.download()
        self.load(seed=0)
        return self.store.folder

    def check_classes(self, names: Sequence[str], where: Path | str) -> None:
        """
        Raises:
            ConfigError: the number of classes is not the data set's own or, if that varies, not the config's.
        """
        expected = self.classes or self.config.classes
        if expected not in (None, len(names)):
            key = f"data.name: {self.config.name!r}" if self.classes else f"data.classes: {expected}"
            listed = some(names) or "none"
            raise ConfigError(f"{key} means {expected} classes, but '{where}' has {len(names)} ({listed})")


class TorchvisionSource(FileSource):
    """A data set of known files below data.root, which torchvision can download. Only `fedpeft prefetch` does so."""

    files: ClassVar[tuple[str, ...]]
    """The files' paths below data.root."""

    @abstractmethod
    def fetch(self, folder: Path) -> None:
        """Downloads the files into a folder. torchvision checks their digests."""

    @property
    def paths(self) -> list[Path]:
        return [self.root / file for file in self.files]

    def identity(self) -> Any:
        if missing := self._missing():
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ConfigError(
                f"data.name: {self.config.name!r} needs the file {missing[0]}{more} below data.root: "
                f"'{self.root}', and there is none; {PREFETCH}"
            )
        return stamp(self.paths, self.root)

    def download(self) -> None:
        """Fetches into a folder beside the files' places, then moves all of them."""
        if not self._missing():
            return
        root, lock, created = self.root, self.root / f".{self.config.name}.lock", not self.root.exists()
        incoming = root / f".{self.config.name}.incoming"
        try:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(lock), ExitStack() as cleanup:
                cleanup.callback(shutil.rmtree, incoming, ignore_errors=True)
                if self._missing():  # no other process has fetched them meanwhile
                    shutil.rmtree(incoming, ignore_errors=True)  # left by a download that was killed
                    incoming.mkdir()
                    self.fetch(incoming)
                    for file, path in zip(self.files, self.paths):
                        path.parent.mkdir(exist_ok=True)
                        (incoming / file).replace(path)
        except Exception as error:  # the disk, the network and torchvision's checks raise errors of many classes
            if created and root.is_dir() and list(root.iterdir()) == [lock]:
                shutil.rmtree(root)
            raise ConfigError(
                f"data.name: {self.config.name!r} cannot be downloaded to data.root: '{root}' "
                f"({one_line(error, 200)}); try again where there is internet, "
                f"or put {self.files[0]} and its like there"
            ) from None

    def _missing(self) -> list[str]:
        return [file for file, path in zip(self.files, self.paths) if not path.is_file()]


def stamp(paths: Iterable[Path], root: Path) -> list[list[Any]]:
    """The name below root, the size and the time of change of each file. Moving the files changes none of them."""
    stats = [(path.relative_to(root).as_posix(), path.stat()) for path in paths]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def check_labels(labels: np.ndarray, num_classes: int, where: Path) -> None:
    """
    Raises:
        ConfigError: there is no sample, or a label outside 0 .. num_classes - 1.
    """
    if not len(labels):
        raise ConfigError(f"data.root: '{where}' holds no sample")
    for label in (labels.min(), labels.max()):
        if not 0 <= label < num_classes:
            raise ConfigError(f"data.root: '{where}' holds the label {label}; valid are 0 to {num_classes - 1}")


def unreadable(
    path: Path | str,
    reason: Exception | str,
    remedy: str = "put a whole copy of the file there",
    key: str = "data.root",
) -> ConfigError:
    """The error for a file that is damaged or has other contents than expected."""
    return ConfigError(f"{key}: '{printable(path)}' cannot be read ({one_line(reason, 200)}); {remedy}")


def some(names: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def printable(name: Path | str) -> str:
    """A file's name as text that can be encoded: bytes that are not UTF-8 become `\\x..`."""
    return str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
