"""Writes a store's files one after another, from the first byte to the last, and renames their folder into place.

Nothing is written through a memory map. There, a full disk would be a signal; here it is an error with a message.

Shapes: S samples of a split, C channels, H x W pixels.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.data.build_progress import BuildProgress
from fedpeft_dist.data.datasets import Contents, Part
from fedpeft_dist.runtime.files import DISK_FULL

META = "meta.json"


def write_store(contents: Contents, building: Path, folder: Path, name: str) -> None:
    """Writes a data set's files below `building`, an empty folder, and renames it to `folder`.

    Raises:
        ConfigError: a source file is damaged, or the disk is full or cannot be written.
    """
    parts = {"train": contents.train, "test": contents.test}
    needed = sum(int(np.prod(part.shape)) + part.labels.nbytes for part in parts.values())
    free = shutil.disk_usage(building).free
    with _told_of_full_disk(folder.parent, name, needed, free):
        if needed > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    num_images = sum(part.shape[0] for part in parts.values())
    with BuildProgress(f"{folder.name}: decoding", num_images) as progress:
        for split, part in parts.items():
            # Reading and writing take turns here. An error of a reader is never taken for a full disk, because readers
            # turn their own errors into ConfigError.
            with _told_of_full_disk(folder.parent, name, needed, free):
                _write_images(part, building / f"{split}_images.npy", progress)
                _write_array(part.labels, building / f"{split}_labels.npy")
                if part.groups is not None:
                    _write_array(part.groups, building / f"{split}_groups.npy")
    with _told_of_full_disk(folder.parent, name, needed, free):
        for file, text in contents.texts.items():
            _write_text(text, building / file)
        files = {path.name: path.stat().st_size for path in sorted(building.iterdir())}
        meta = {"name": name, "class_names": contents.class_names, "cropped": contents.cropped, "files": files}
        _write_text(json.dumps(meta, indent=1), building / META)
        _flush_folder(building)
        os.rename(building, folder)
        _flush_folder(folder.parent)
    progress.tell_done(folder)


@contextmanager
def _told_of_full_disk(root: Path, name: str, needed: int, free: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise ConfigError(f"data.store: '{root}' cannot be written ({error.strerror or error})") from None
        raise ConfigError(
            f"data.store: '{root}' has no room for {name}: {needed:,} bytes are needed and {free:,} were free "
            f"({error.strerror}); free some, or give data.store a folder on another disk"
        ) from None


def _write_images(part: Part, path: Path, progress: BuildProgress) -> None:
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
        _flush(file)


def _write_array(array: np.ndarray, path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)
        _flush(file)


def _write_text(text: str, path: Path) -> None:
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:  # names may not be UTF-8
        file.write(text)
        _flush(file)


def _flush(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Makes the names in a folder survive a crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
