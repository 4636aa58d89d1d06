"""Images in class folders: `<class>/*` below a folder. How they are listed, and the data set that is nothing else.

Shapes: S samples, C channels, H x W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import ImageFolderConfig
from fedpeft_dist.data.image_files import SUFFIXES, Form, choose_form, decode_chunks, encoded_files
from fedpeft_dist.data.source import Contents, Part, Source, check_num_classes


@dataclass(frozen=True)
class ClassFolders:
    """The image files below a folder, by class; both in the order of their names."""

    folder: Path
    files: dict[str, list[str]]
    """Class to files, as `<class>/<file>`."""
    identity: list[list[str | int]]
    """Name, size and time of change of each file."""

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.files)


def list_classes(folder: Path) -> list[str]:
    """The names of the class folders, sorted; hidden ones do not count.

    Raises:
        ConfigError: no such folder, or none in it.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise ConfigError(f"data.root: '{folder}' must hold a folder for each class ({error.strerror})") from None
    if not names:
        raise ConfigError(f"data.root: '{folder}' must hold a folder for each class, and holds none")
    return names


def list_images(folder: Path) -> ClassFolders:
    """
    Raises:
        ConfigError: no such folder, or a class without an image.
    """
    files, identity = {}, []
    for name in list_classes(folder):
        with os.scandir(folder / name) as entries:
            images = sorted((e for e in entries if _is_image(e)), key=lambda entry: entry.name)
        if not images:
            kinds = ", ".join(sorted(SUFFIXES))
            raise ConfigError(f"data.root: '{folder / name}' is a class folder without an image ({kinds})")
        files[name] = [f"{name}/{image.name}" for image in images]
        for path, image in zip(files[name], images):
            stat = image.stat()
            identity.append([path, stat.st_size, stat.st_mtime_ns])
    return ClassFolders(folder, files, identity)


def _is_image(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".") and Path(entry.name).suffix.lower() in SUFFIXES and entry.is_file()


def folder_part(folder: Path, names: Sequence[str], class_names: Sequence[str], form: Form) -> Part:
    """The split that consists of these files, named `<class>/<file>`."""
    numbers = {name: number for number, name in enumerate(class_names)}
    labels = np.array([numbers[name.partition("/")[0]] for name in names], dtype=np.int64)
    shape = (len(names), form.channels, form.height, form.width)
    return Part(shape, labels, lambda: decode_chunks(encoded_files(folder, names), form))


def image_folder_source(config: ImageFolderConfig) -> Source:
    """
    Raises:
        ConfigError: folders that are missing or empty, or whose classes are not the same, or not as many as expected.
    """
    train, test = (list_images(Path(config.root) / name) for name in (config.train_folder, config.test_folder))
    if train.class_names != test.class_names:
        lone = sorted(set(train.class_names) ^ set(test.class_names))
        owner = train.folder if lone[0] in train.files else test.folder
        raise ConfigError(
            f"data.train_folder: '{train.folder}' and data.test_folder: '{test.folder}' must have the same class "
            f"folders; only '{owner}' has {lone[0]!r}"
        )
    if config.classes is not None:
        check_num_classes(f"data.classes: {config.classes}", config.classes, f"'{train.folder}'", train.class_names)
    identity = [config.stored_size, train.identity, test.identity]
    return Source(identity, lambda: _read(train, test, config.stored_size))


def _read(train: ClassFolders, test: ClassFolders, stored_size: int) -> Contents:
    names = [[name for files in split.files.values() for name in files] for split in (train, test)]
    everything = [*encoded_files(train.folder, names[0]), *encoded_files(test.folder, names[1])]
    form = choose_form(everything, stored_size)
    parts = [folder_part(s.folder, own, train.class_names, form) for s, own in zip((train, test), names)]
    return Contents(train.class_names, *parts)
