"""Images in class folders at any depth, `<class>/**/*`: how to list them, and the data set `image_folder`.

The listing is torchvision's, without hidden files and folders. As in torchvision and timm, images are not turned by
their EXIF orientation.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import ImageFolderConfig
from fedpeft_dist.data.datasets import Contents
from fedpeft_dist.data.image_files import DECODING, EncodedPart, encoded_contents, encoded_files, image_suffixes
from fedpeft_dist.data.source import FileSource, printable


@dataclass(frozen=True)
class ClassFolders:
    """The image files below a folder, by class. They are sorted by class, then by folder."""

    folder: Path
    files: dict[str, list[str]]
    """The files of each class folder, as `<class>/<file>` or `<class>/<folder>/<file>`."""
    identity: list[list[str | int]]
    """The name, size and time of change of each file."""
    passed_over: Counter[str]
    """The reasons for which files were left out, and how many files for each."""

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(map(printable, self.files))

    def part(self, names: Sequence[str]) -> EncodedPart:
        """The split of these files, in this order."""
        numbers = {name: number for number, name in enumerate(self.files)}
        labels = np.array([numbers[name.partition("/")[0]] for name in names], dtype=np.int64)
        return EncodedPart(lambda: encoded_files(self.folder, names), labels)


def list_classes(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the class folders, sorted, without hidden folders; and the names of the files beside them."""
    try:
        with os.scandir(folder) as entries:
            is_folder = {entry.name: _is_folder(entry) for entry in entries}
    except OSError as error:
        raise ConfigError(f"data.root: '{folder}' must hold a folder for each class ({error.strerror})") from None
    names = sorted(name for name in is_folder if is_folder[name] and not name.startswith("."))
    if not names:
        raise ConfigError(f"data.root: '{folder}' must hold a folder for each class, and holds none")
    return names, [name for name in is_folder if not is_folder[name]]


def list_images(folder: Path) -> ClassFolders:
    """Lists the class folders at any depth. A class without an image raises ConfigError."""
    files, identity, (names, beside) = {}, [], list_classes(folder)
    passed_over = Counter("hidden" if name.startswith(".") else "beside the class folders" for name in beside)
    for name in names:
        before = passed_over.total()
        images = sorted(_walk(folder / name, name, (), passed_over), key=lambda image: image[0].rpartition("/")[::2])
        if not images:
            others = passed_over.total() - before
            raise ConfigError(
                f"data.root: '{printable(folder / name)}' is a class folder without an image ({others} other files); "
                "read are .jpg, .png, .bmp, .gif, .tif, .webp and other endings of Pillow's picture formats"
            )
        files[name] = [image[0] for image in images]
        identity += images
    return ClassFolders(folder, files, identity, passed_over)


def _walk(
    folder: Path, prefix: str, above: tuple[os.stat_result, ...], passed_over: Counter[str]
) -> Iterator[list[str | int]]:
    """The images below a folder, as [`<prefix>/<file>`, size, time of change]. Links are followed.

    Args:
        above: the folders above, so that a link to one of them makes no endless loop.
        passed_over: counts the files that are left out.
    """
    try:
        own = os.stat(folder)
        with os.scandir(folder) as entries:
            listed = list(entries)
    except OSError as error:
        raise ConfigError(f"data.root: '{printable(folder)}' cannot be listed ({error.strerror})") from None
    if any(os.path.samestat(own, other) for other in above):
        passed_over["links to a folder above"] += 1
        return
    for entry in listed:
        suffix = Path(entry.name).suffix.lower()
        if entry.name.startswith("."):
            passed_over["hidden"] += 1
        elif _is_folder(entry):
            yield from _walk(folder / entry.name, f"{prefix}/{entry.name}", (*above, own), passed_over)
        elif suffix not in image_suffixes():
            passed_over[printable(suffix) or "without an ending"] += 1
        elif not os.path.isfile(entry):
            passed_over["broken links"] += 1
        else:
            yield [f"{prefix}/{entry.name}", entry.stat().st_size, entry.stat().st_mtime_ns]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether the entry is a folder or a link to one. A link to itself is neither, and raises no error."""
    return entry.is_dir(follow_symlinks=False) or os.path.isdir(entry)


def passed_over_notes(*folders: ClassFolders) -> tuple[str, ...]:
    """One line that says how many files were left out and why, or nothing."""
    told = [
        f"{folder.passed_over.total():,} in '{printable(folder.folder)}' "
        f"({', '.join(f'{count:,} {reason}' for reason, count in folder.passed_over.most_common())})"
        for folder in folders
        if folder.passed_over
    ]
    return (f"files passed over, since they are not read as images: {', '.join(told)}",) if told else ()


class ImageFolderSource(FileSource):
    """Two folders of class folders, one for training and one for testing."""

    config: ImageFolderConfig

    def num_classes(self) -> int:
        return self.config.classes or len(list_classes(self.root / self.config.train_folder)[0])

    def identity(self) -> Any:
        return [DECODING, self.config.stored_size, *(split.identity for split in self.splits)]

    @cached_property
    def splits(self) -> tuple[ClassFolders, ClassFolders]:
        config = self.config
        train, test = (list_images(self.root / name) for name in (config.train_folder, config.test_folder))
        if train.files.keys() != test.files.keys():
            lone = sorted(train.files.keys() ^ test.files.keys())
            owner = train.folder if lone[0] in train.files else test.folder
            raise ConfigError(
                f"data.train_folder: '{train.folder}' and data.test_folder: '{test.folder}' must have the same class "
                f"folders; only '{owner}' has '{printable(lone[0])}'"
            )
        self.check_classes(train.class_names, train.folder)
        return train, test

    def read(self) -> Contents:
        parts = [split.part(list(chain.from_iterable(split.files.values()))) for split in self.splits]
        notes = passed_over_notes(*self.splits)
        return encoded_contents(self.splits[0].class_names, parts, self.config.stored_size, notes)
