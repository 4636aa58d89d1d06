"""Images in class folders, at any depth: `<class>/**/*`. How they are listed, and the data set that is nothing else.

They are listed as torchvision does, but for hidden files and folders. As in torchvision and timm, images are not turned
by their EXIF orientation.

Shapes: S samples, C channels, H x W pixels.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import ImageFolderConfig
from fedpeft_dist.data.image_files import DECODING, Form, choose_form, decode_chunks, encoded_files, image_suffixes
from fedpeft_dist.data.source import Contents, Part, Source, check_num_classes, printable


@dataclass(frozen=True)
class ClassFolders:
    """The image files below a folder, by class, in the order of the classes' names and of the files' folders."""

    folder: Path
    files: dict[str, list[str]]
    """Class folder to files, as `<class>/<file>` or `<class>/<folder>/<file>`."""
    identity: list[list[str | int]]
    """Name, size and time of change of each file."""
    passed_over: Counter[str]
    """Why other files are left out, and how many."""

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(printable(name) for name in self.files)


def list_classes(folder: Path) -> list[str]:
    """The names of the class folders, sorted; hidden ones do not count.

    Raises:
        ConfigError: no such folder, or none in it.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if _is_folder(entry) and not entry.name.startswith("."))
    except OSError as error:
        raise ConfigError(f"data.root: '{folder}' must hold a folder for each class ({error.strerror})") from None
    if not names:
        raise ConfigError(f"data.root: '{folder}' must hold a folder for each class, and holds none")
    return names


def list_images(folder: Path) -> ClassFolders:
    """
    Raises:
        ConfigError: no such folder, one that cannot be listed, or a class without an image.
    """
    files, identity = {}, []
    names = list_classes(folder)
    with os.scandir(folder) as entries:
        beside = [entry.name for entry in entries if not _is_folder(entry)]
    passed_over = Counter("hidden" if name.startswith(".") else "beside the class folders" for name in beside)
    for name in names:
        before = passed_over.total()
        images = dict(_walk(folder / name, name, (), passed_over))
        if not images:
            others = passed_over.total() - before
            raise ConfigError(
                f"data.root: '{printable(folder / name)}' is a class folder without an image ({others} other files); "
                "read are .jpg, .png, .bmp, .gif, .tif, .webp and other endings of Pillow's picture formats"
            )
        files[name] = sorted(images, key=lambda path: path.rpartition("/")[::2])
        identity += [[path, images[path].st_size, images[path].st_mtime_ns] for path in files[name]]
    return ClassFolders(folder, files, identity, passed_over)


def _walk(
    folder: Path, prefix: str, above: tuple[tuple[int, int], ...], passed_over: Counter[str]
) -> Iterator[tuple[str, os.stat_result]]:
    """The images below a folder, links followed: (`<prefix>/<file>`, its properties).

    Args:
        above: device and number of the folders that the walk has come through, so that a link to one does not loop.
        passed_over: counts what is left out.
    """
    try:
        own = os.stat(folder)
        with os.scandir(folder) as entries:
            listed = list(entries)
    except OSError as error:
        raise ConfigError(f"data.root: '{printable(folder)}' cannot be listed ({error.strerror})") from None
    above = (*above, (own.st_dev, own.st_ino))
    if above[-1] in above[:-1]:
        passed_over["links to a folder above"] += 1
        return
    for entry in listed:
        suffix = Path(entry.name).suffix.lower()
        if entry.name.startswith("."):
            passed_over["hidden"] += 1
        elif _is_folder(entry):
            yield from _walk(folder / entry.name, f"{prefix}/{entry.name}", above, passed_over)
        elif suffix not in image_suffixes():
            passed_over[printable(suffix) or "without an ending"] += 1
        elif not os.path.isfile(entry):
            passed_over["broken links"] += 1
        else:
            yield f"{prefix}/{entry.name}", entry.stat()


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether the entry is a folder or a link to one; a link to itself is neither, and is no error."""
    return entry.is_dir(follow_symlinks=False) or os.path.isdir(entry)


def passed_over_notes(*folders: ClassFolders) -> tuple[str, ...]:
    """At most one line: how many files are left out, and why."""
    told = [
        f"{folder.passed_over.total():,} in '{printable(folder.folder)}' "
        f"({', '.join(f'{count:,} {reason}' for reason, count in folder.passed_over.most_common())})"
        for folder in folders
        if folder.passed_over
    ]
    return (f"files passed over, since they are not read as images: {', '.join(told)}",) if told else ()


def folder_part(folder: Path, names: Sequence[str], classes: Iterable[str], form: Form) -> Part:
    """The split that consists of these files, whose names begin with that of a class folder."""
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers[name.partition("/")[0]] for name in names], dtype=np.int64)
    shape = (len(names), form.channels, form.height, form.width)
    return Part(shape, labels, lambda: decode_chunks(encoded_files(folder, names), form))


def image_folder_source(config: ImageFolderConfig) -> Source:
    """
    Raises:
        ConfigError: folders that are missing or empty, or whose classes are not the same, or not as many as expected.
    """
    train, test = (list_images(Path(config.root) / name) for name in (config.train_folder, config.test_folder))
    if train.files.keys() != test.files.keys():
        lone = sorted(train.files.keys() ^ test.files.keys())
        owner = train.folder if lone[0] in train.files else test.folder
        raise ConfigError(
            f"data.train_folder: '{train.folder}' and data.test_folder: '{test.folder}' must have the same class "
            f"folders; only '{owner}' has '{printable(lone[0])}'"
        )
    if config.classes is not None:
        check_num_classes(f"data.classes: {config.classes}", config.classes, f"'{train.folder}'", train.class_names)
    identity = [DECODING, config.stored_size, train.identity, test.identity]
    return Source(identity, lambda: _read(train, test, config.stored_size))


def _read(train: ClassFolders, test: ClassFolders, stored_size: int) -> Contents:
    names = [[name for files in split.files.values() for name in files] for split in (train, test)]
    everything = [*encoded_files(train.folder, names[0]), *encoded_files(test.folder, names[1])]
    form = choose_form(everything, stored_size)
    parts = [folder_part(s.folder, own, train.files, form) for s, own in zip((train, test), names)]
    notes = passed_over_notes(train, test) + form.notes
    return Contents(train.class_names, *parts, cropped=form.cropped, notes=notes)
