"""Data sets whose files torchvision can download. Only `fedpeft prefetch` does so."""

import shutil
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock

from fedpeft_dist.config.errors import ConfigError, one_line
from fedpeft_dist.data.source import PREFETCH, FileSource, stamp


class TorchvisionSource(FileSource):
    """A data set of known files below data.root."""

    files: ClassVar[tuple[str, ...]]
    """The files' paths below data.root."""

    @abstractmethod
    def fetch(self, folder: Path) -> None:
        """Downloads the files into a folder. torchvision checks their digests."""

    @property
    def paths(self) -> list[Path]:
        return [Path(self.config.root) / file for file in self.files]

    def identity(self) -> Any:
        missing = self._missing()
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ConfigError(
                f"data.name: {self.config.name!r} needs the file {missing[0]}{more} below data.root: "
                f"'{self.config.root}', and there is none; {PREFETCH}"
            )
        return stamp(self.paths, Path(self.config.root))

    def download(self) -> None:
        """Fetches into a folder beside the files' places, then moves all of them."""
        if not self._missing():
            return
        root = Path(self.config.root)
        lock, created = root / f".{self.config.name}.lock", not root.exists()
        try:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):
                if self._missing():  # no other process has fetched them meanwhile
                    self._fetch_and_move(root / f".{self.config.name}.incoming")
        except Exception as error:  # the disk, the network and torchvision's checks raise errors of many classes
            if created and root.is_dir() and list(root.iterdir()) == [lock]:
                shutil.rmtree(root)
            raise ConfigError(
                f"data.name: {self.config.name!r} cannot be downloaded to data.root: '{root}' "
                f"({one_line(error, 200)}); try again where there is internet, or put {self.files[0]} "
                "and its like there"
            ) from None

    def _fetch_and_move(self, incoming: Path) -> None:
        shutil.rmtree(incoming, ignore_errors=True)  # left by a download that was killed
        try:
            incoming.mkdir()
            self.fetch(incoming)
            for file, path in zip(self.files, self.paths):
                path.parent.mkdir(exist_ok=True)
                (incoming / file).replace(path)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)

    def _missing(self) -> list[str]:
        return [file for file, path in zip(self.files, self.paths) if not path.is_file()]
