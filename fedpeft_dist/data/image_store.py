"""Decoded data sets on disk: found, or built once by one process while the others wait, and opened as memory maps.

A store is a folder `<data set>-<hash of what its files are>`, with an .npy file for each tensor. All ranks of a machine
read the same maps, so the images lie in its memory once, in the page cache, and leave it when memory is short.

Shapes: S samples of a split, C channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import uuid
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import DataConfig
from fedpeft_dist.data.datasets import Dataset, ImageSet
from fedpeft_dist.data.source import Source
from fedpeft_dist.data.store_writer import META, write_store

FORMAT = 1
"""Of the files in a store and of how images are decoded: another number has every store built anew."""


def store_folder(source: Source, config: DataConfig) -> Path:
    """Where a data set's decoded images are, or will be."""
    text = json.dumps([FORMAT, source.identity])
    root = Path(config.store) if config.store is not None else Path(config.root) / ".store"
    return root / f"{config.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def open_store(source: Source, config: DataConfig) -> Dataset:
    """The decoded data set; it is built first where it is not there whole.

    Raises:
        ConfigError: source files that cannot be read; a store that cannot be written.
    """
    folder = store_folder(source, config)
    dataset = _open(folder)
    if dataset is not None:
        return dataset
    lock = _take_lock(folder)
    try:
        return _open(folder) or _build(source, folder, config.name)
    finally:
        lock.release()


def _take_lock(folder: Path) -> FileLock:
    """The right to build a store; waits, however long that takes, while another process has it."""
    lock = FileLock(_lock_file(folder))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        before = _failure(folder)
        with suppress(Timeout):
            lock.acquire(blocking=False)
            return lock
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # the second where a file system knows no locks
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"data.store: '{folder.parent}' cannot be written ({reason}); give data.store a folder that can be"
        ) from None
    after = _failure(folder)
    if after not in (None, before):
        # Who waited for a builder in vain fails with its reason, in place of finding the same after as long again.
        lock.release()
        raise ConfigError(after.partition("\n")[2])
    return lock


def _open(folder: Path) -> Dataset | None:
    """None where there is no store, or none that is whole: files are missing or have other sizes than were written.

    Raises:
        ConfigError: it is there and may not be read, or the machine cannot map it; no reason to build it anew.
    """
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        for name, size in meta["files"].items():
            if (folder / name).stat().st_size != size:
                return None
        train, test = (_open_split(folder, split, meta["files"]) for split in ("train", "test"))
        return Dataset(train, test, tuple(meta["class_names"]), meta.get("cropped", False))
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None
    except OSError as error:
        raise ConfigError(f"data.store: '{folder}' cannot be opened ({error.strerror or error})") from None


def _open_split(folder: Path, split: str, files: dict[str, int]) -> ImageSet:
    images = np.load(folder / f"{split}_images.npy", mmap_mode="r")
    labels = torch.from_numpy(np.load(folder / f"{split}_labels.npy"))
    groups = None
    if f"{split}_groups.npy" in files:
        groups = torch.from_numpy(np.load(folder / f"{split}_groups.npy"))
    return ImageSet(read_only_tensor(images), labels, groups)


def read_only_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor over a read-only memory map; nothing is copied.

    PyTorch knows no read-only tensors and warns. A private map would be writable, but the kernel may refuse to promise
    memory for one that is larger than it has.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _build(source: Source, folder: Path, name: str) -> Dataset:
    """Builds under the lock, in a folder beside, which is flushed and renamed."""
    _remove_abandoned(folder.parent)
    building = _building_folder(folder)
    try:
        if folder.exists():
            print(f"{folder}: damaged, it is built anew", file=sys.stderr, flush=True)
            shutil.rmtree(folder)
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
    except OSError as error:
        raise ConfigError(
            f"data.store: '{folder}' cannot be made anew ({error.strerror or error}); remove it, or give data.store "
            "another folder"
        ) from None
    try:
        with (
            warnings.catch_warnings()
        ):  # Pillow warns of odd metadata, and of large pictures that it reads all the same
            warnings.filterwarnings("ignore", module=r"PIL\b")
            contents = source.read()
            write_store(contents, building, folder, name)
    except BaseException as error:
        shutil.rmtree(building, ignore_errors=True)
        if isinstance(error, ConfigError):
            with suppress(OSError):  # perhaps the disk is full to the last byte
                _failure_file(folder).write_text(f"{uuid.uuid4()}\n{error}", encoding="utf-8")
        raise
    _failure_file(folder).unlink(missing_ok=True)
    for note in contents.notes:
        print(f"note: {note}", file=sys.stderr, flush=True)
    dataset = _open(folder)
    assert dataset is not None
    return dataset


def _remove_abandoned(root: Path) -> None:
    """Removes what builders left behind that were killed: nobody holds the lock of their stores any more."""
    for building in root.glob(".*.building"):
        lock = FileLock(_lock_file(root / building.name.removeprefix(".").removesuffix(".building")))
        with suppress(Timeout, OSError), lock.acquire(blocking=False):
            shutil.rmtree(building, ignore_errors=True)


def _failure(folder: Path) -> str | None:
    """How the last attempt to build this store failed: a unique line, and the message."""
    try:
        return _failure_file(folder).read_text(encoding="utf-8")
    except OSError:
        return None


def _failure_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.failed")


def _building_folder(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.building")


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")
