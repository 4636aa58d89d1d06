"""Writes a store's files one after another, from the first byte to the last, and renames their folder into place.

Nothing is written through a memory map. There, a full disk would be a signal; here it is an error with a message.

Shapes: S samples of a split, C channels, H x W pixels.
"""

import errno
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.data.datasets import Contents, Part
from fedpeft_dist.runtime.files import DISK_FULL
from fedpeft_dist.runtime.progress import ProgressBar

META = "meta.json"
SECONDS_BETWEEN_LINES = 30
SECONDS_WORTH_TELLING = 5


def write_store(contents: Contents, building: Path, folder: Path, name: str) -> None:
    """Writes a data set's files below `building`, an empty folder, and renames it to `folder`.

    Raises:
        ConfigError: a source file is damaged, or the disk is full or cannot be written.
    """
    parts = {"train": contents.train, "test": contents.test}
    needed = sum(int(np.prod(part.shape)) + part.labels.nbytes for part in parts.values())
    free = shutil.disk_usage(building).free
    try:
        if needed > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with BuildProgress(folder, sum(part.shape[0] for part in parts.values())) as progress:
            for split, part in parts.items():
                # An error of a reader is never taken for a full disk, because readers turn theirs into ConfigError.
                _write_images(part, building / f"{split}_images.npy", progress)
                np.save(building / f"{split}_labels.npy", part.labels, allow_pickle=False)
                if part.groups is not None:
                    np.save(building / f"{split}_groups.npy", part.groups, allow_pickle=False)
        for file, text in contents.texts.items():
            _write_text(text, building / file)
        files = {path.name: path.stat().st_size for path in sorted(building.iterdir())}
        meta = {"name": name, "class_names": contents.class_names, "cropped": contents.cropped, "files": files}
        _write_text(json.dumps(meta, indent=1), building / META)
        for path in (*building.iterdir(), building):
            _flush(path)
        os.rename(building, folder)
        _flush(folder.parent)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise ConfigError(f"data.store: '{folder.parent}' cannot be written ({error.strerror or error})") from None
        raise ConfigError(
            f"data.store: '{folder.parent}' has no room for {name}: {needed:,} bytes are needed and {free:,} were free "
            f"({error.strerror}); free some, or give data.store a folder on another disk"
        ) from None
    progress.tell_done()


def _write_images(part: Part, path: Path, progress: "BuildProgress") -> None:
    written = 0
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": part.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in part.chunks():
            assert chunk.dtype == np.uint8
            assert chunk.shape[1:] == part.shape[1:]
            file.write(np.ascontiguousarray(chunk).data)
            written += len(chunk)
            progress.images_done(len(chunk))
    assert written == part.shape[0]


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8", errors="surrogateescape")  # names may not be UTF-8


def _flush(path: Path) -> None:
    """Makes a file's content, or the names in a folder, survive a crash."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class BuildProgress(ProgressBar):
    """A context manager that shows on stderr how many of a store's images are decoded.

    A terminal gets a bar. Anything else gets a line now and then.
    """

    def __init__(self, folder: Path, total: int):
        super().__init__(Console(stderr=True), f"{folder.name}: decoding", total, transient=True)
        self.folder, self.count = folder, 0
        self.started = self.told = time.monotonic()

    def images_done(self, count: int) -> None:
        """Adds images that have been written."""
        self.count += count
        self.advance_to(self.count)
        if not self.console.is_terminal and time.monotonic() - self.told > SECONDS_BETWEEN_LINES:
            self.told = time.monotonic()
            self.note(f"{self.title} {self.count:,} of {self.total:,} images")

    def tell_done(self) -> None:
        """Prints where the images are, if decoding them took noticeable time."""
        seconds = time.monotonic() - self.started
        if seconds > SECONDS_WORTH_TELLING:
            self.note(f"{self.folder}: {self.total:,} images decoded in {seconds:,.0f} s")
