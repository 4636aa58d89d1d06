"""Decoded data sets on disk. One process builds a store while the others wait; then all open it as memory maps.

A store is a folder `<data set>-<hash of its identity>` with one .npy file for each tensor. All ranks of a machine map
the same files. The images are therefore in its memory once, in the page cache, and leave it when memory is short. Files
are written from the first byte to the last, and never through a map: there, a full disk would be a signal.

Shapes: S samples of a split, C channels, H x W pixels.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import AcquireReturnProxy, FileLock, Timeout

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.data.datasets import Contents, Dataset, ImageSet, Part
from fedpeft_dist.runtime.files import DISK_FULL
from fedpeft_dist.runtime.streams import ProgressBar

FORMAT = 1
"""The version of a store's files and of how images are decoded. A new number makes every store be built again."""
META = "meta.json"
SECONDS_BETWEEN_LINES = 30
SECONDS_WORTH_TELLING = 5


class ImageStore:
    """The store of one data set.

    Args:
        root: the folder of all stores.
        name: the data set's name.
        identity: a JSON value that changes whenever the decoded images would.
    """

    def __init__(self, root: Path, name: str, identity: Any):
        digest = hashlib.sha256(json.dumps([FORMAT, identity]).encode()).hexdigest()
        self.name, self.folder = name, root / f"{name}-{digest[:16]}"
        self.lock_file = root / f".{self.folder.name}.lock"
        self.building = root / f".{self.folder.name}.building"
        self.failure_file = root / f".{self.folder.name}.failed"

    def load(self, read: Callable[[], Contents]) -> Dataset:
        """Opens the store; builds it first from what `read` returns if it is missing or damaged.

        Raises:
            ConfigError: the files cannot be read, or the store cannot be written.
        """
        dataset = self._open()
        if dataset is not None:
            return dataset
        with self._take_lock():
            return self._open() or self._build(read)

    def _open(self) -> Dataset | None:
        """None if the store is missing or damaged: a file is missing or has another size than was written."""
        try:
            meta = json.loads((self.folder / META).read_text(encoding="utf-8"))
            if any((self.folder / name).stat().st_size != size for name, size in meta["files"].items()):
                return None
            train, test = (self._open_split(split) for split in ("train", "test"))
            return Dataset(train, test, tuple(meta["class_names"]), meta.get("cropped", False))
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
            return None
        except OSError as error:  # building it again would not help
            raise ConfigError(f"data.store: '{self.folder}' cannot be opened ({error.strerror or error})") from None

    def _open_split(self, split: str) -> ImageSet:
        images = np.load(self.folder / f"{split}_images.npy", mmap_mode="r")
        labels, groups = self.folder / f"{split}_labels.npy", self.folder / f"{split}_groups.npy"
        return ImageSet(
            read_only_tensor(images),
            torch.from_numpy(np.load(labels)),
            torch.from_numpy(np.load(groups)) if groups.exists() else None,
        )

    def _take_lock(self) -> AcquireReturnProxy:
        """Takes the lock for building the store; waits for as long as another process holds it."""
        lock = FileLock(self.lock_file)
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            before = self._failure()
            with suppress(Timeout):
                return lock.acquire(blocking=False)
            taken = lock.acquire()
        except (OSError, NotImplementedError) as error:  # NotImplementedError: the file system has no locks
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"data.store: '{self.folder.parent}' cannot be written ({reason}); give data.store a folder that can be"
            ) from None
        after = self._failure()
        if after not in (None, before):
            # If the builder we waited for failed, raise its error instead of building again.
            lock.release()
            raise ConfigError(after.partition("\n")[2])
        return taken

    def _failure(self) -> str | None:
        """How the last attempt to build this store failed: a unique line, and the message."""
        with suppress(OSError):
            return self.failure_file.read_text(encoding="utf-8")

    def _build(self, read: Callable[[], Contents]) -> Dataset:
        """Builds the store in a folder beside its place, then flushes and renames that folder. Needs the lock."""
        self._make_room()
        try:
            with warnings.catch_warnings():
                # Pillow warns of odd metadata, and of large pictures although it reads them.
                warnings.filterwarnings("ignore", module=r"PIL\b")
                contents = read()
                write_store(contents, self.building, self.folder, self.name)
        except BaseException as error:
            shutil.rmtree(self.building, ignore_errors=True)
            if isinstance(error, ConfigError):
                with suppress(OSError):  # the disk may be full
                    self.failure_file.write_text(f"{uuid.uuid4()}\n{error}", encoding="utf-8")
            raise
        self.failure_file.unlink(missing_ok=True)
        for note in contents.notes:
            print(f"note: {note}", file=sys.stderr, flush=True)
        dataset = self._open()
        assert dataset is not None
        return dataset

    def _make_room(self) -> None:
        """Removes a damaged store and what killed builders left, and makes an empty folder to build in."""
        for building in self.folder.parent.glob(".*.building"):
            # Nobody holds the lock of a killed builder's store any more.
            with suppress(Timeout, OSError), FileLock(building.with_suffix(".lock")).acquire(blocking=False):
                shutil.rmtree(building, ignore_errors=True)
        try:
            if self.folder.exists():
                print(f"{self.folder}: damaged, it is built anew", file=sys.stderr, flush=True)
                shutil.rmtree(self.folder)
            shutil.rmtree(self.building, ignore_errors=True)
            self.building.mkdir()
        except OSError as error:
            raise ConfigError(
                f"data.store: '{self.folder}' cannot be made anew ({error.strerror or error}); remove it, or give "
                "data.store another folder"
            ) from None


def read_only_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor over a read-only memory map, without a copy.

    PyTorch has no read-only tensors and warns. A private map would be writable, but the kernel may refuse to promise
    memory for a map that is larger than its memory.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


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
        super().__init__(f"{folder.name}: decoding", total, stream=sys.stderr, transient=True)
        self.folder, self.count = folder, 0
        self.started = self.told = time.monotonic()

    def images_done(self, count: int) -> None:
        """Adds images that have been written."""
        self.count += count
        self.advance_to(self.count)
        if not self.is_bar and time.monotonic() - self.told > SECONDS_BETWEEN_LINES:
            self.told = time.monotonic()
            self.note(f"{self.title} {self.count:,} of {self.total:,} images")

    def tell_done(self) -> None:
        """Prints where the images are, if decoding them took noticeable time."""
        seconds = time.monotonic() - self.started
        if seconds > SECONDS_WORTH_TELLING:
            self.note(f"{self.folder}: {self.total:,} images decoded in {seconds:,.0f} s")
