"""NWPU-RESISC45 (Cheng et al. 2017): class folders without a published split. The split is drawn or given as lists."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import Resisc45Config
from fedpeft_dist.data.datasets import Contents
from fedpeft_dist.data.image_files import DECODING, choose_form, encoded_files
from fedpeft_dist.data.image_folder import ClassFolders, folder_part, list_images, passed_over_notes
from fedpeft_dist.data.source import FileSource, check_num_classes, printable
from fedpeft_dist.lanes.random import derive_seed, permutation

FOLDER = "NWPU-RESISC45"
NUM_CLASSES = 45
SIDE = 256
"""The images' width and height in pixels. An image of another size is resized and cropped."""


class Resisc45Source(FileSource):
    config: Resisc45Config

    def num_classes(self) -> int:
        return NUM_CLASSES

    def identity(self) -> Any:
        return [DECODING, self.images.identity, *self.split]

    @cached_property
    def images(self) -> ClassFolders:
        folder = Path(self.config.root) / FOLDER
        if not folder.is_dir():
            raise ConfigError(
                f"data.name: 'resisc45' needs its {NUM_CLASSES} class folders in '{folder}' "
                f"(data.root: '{self.config.root}'), and there is no such folder; the archive has to be downloaded by "
                "hand"
            )
        images = list_images(folder)
        check_num_classes("data.name: 'resisc45'", NUM_CLASSES, f"'{folder}'", images.class_names)
        return images

    @cached_property
    def split(self) -> tuple[list[str], list[str]]:
        """The training images and the test images, as `<class>/<file>`."""
        if self.config.train_list is not None:
            return read_lists(self.images, self.config)
        return draw_split(self.images.files, self.config.test_share, self.config.split_seed)

    def read(self) -> Contents:
        images, (train, test) = self.images, self.split
        form = choose_form(encoded_files(images.folder, [*train, *test]), SIDE)
        parts = [folder_part(images.folder, names, images.files, form) for names in (train, test)]
        texts = {"train.txt": "\n".join(train) + "\n", "test.txt": "\n".join(test) + "\n"}
        notes = passed_over_notes(images) + form.notes
        return Contents(images.class_names, *parts, texts, form.cropped, notes)


def draw_split(files: Mapping[str, Sequence[str]], share: float, seed: int) -> tuple[list[str], list[str]]:
    """(train, test): the same share of every class goes to testing, at least one image and never all.

    The draw of a class depends only on the seed, the class's name and its number of images.

    Raises:
        ConfigError: a class is too small to be split, or the share is 0.
    """
    train, test = [], []
    for name, own in files.items():
        count = max(1, round(share * len(own)))
        if not share or count >= len(own):
            what = f"of class {name!r}, which has {len(own)} image(s), leaves none to train or to test on"
            raise ConfigError(f"data.test_share: {share} {what}")
        drawn = set(permutation(derive_seed(seed, f"resisc45/{printable(name)}"), len(own))[:count].tolist())
        for number, file in enumerate(own):
            (test if number in drawn else train).append(file)
    return train, test


def read_lists(images: ClassFolders, config: Resisc45Config) -> tuple[list[str], list[str]]:
    """(train, test), as the config's text files name them.

    Raises:
        ConfigError: a file cannot be read, an image is missing or named twice, or a class has no image.
    """
    train, test = (_read_list(images, key, getattr(config, key)) for key in ("train_list", "test_list"))
    both = set(train) & set(test)
    if both:
        raise ConfigError(
            f"data.train_list and data.test_list: {min(both)!r} stands in both ({len(both)} images do); "
            "an image is for training or for testing"
        )
    return train, test


def _read_list(images: ClassFolders, key: str, path: str) -> list[str]:
    try:
        # A byte order mark is dropped. Names that are not UTF-8 stay the same bytes as on the disk.
        text = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ConfigError(f"data.{key}: '{path}' cannot be read ({error})") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    known = _names_in_lists(images)
    missing = [line for line in lines if len(known.get(line, ())) != 1]
    if missing:
        found = known.get(missing[0], ())
        problem = f"{len(found)} files have in" if found else "is not in"
        raise ConfigError(
            f"data.{key}: '{path}' names '{printable(missing[0])}', which {problem} '{images.folder}' "
            f"({len(missing)} such lines)"
        )
    names = sorted({known[line][0] for line in lines})
    if len(names) != len(lines):
        raise ConfigError(f"data.{key}: '{path}' names {len(lines) - len(names)} image(s) twice")
    lacking = sorted(set(images.files) - {name.partition("/")[0] for name in names})
    if lacking:
        raise ConfigError(f"data.{key}: '{path}' names no image of class {lacking[0]!r} ({len(lacking)} such classes)")
    return names


def _names_in_lists(images: ClassFolders) -> dict[str, list[str]]:
    """The files behind each name that a list may use.

    In this data set an image's own name tells its class. Lists without folders are therefore in use too.
    """
    known: dict[str, list[str]] = {}
    for files in images.files.values():
        for file in files:
            for name in {file, file.partition("/")[2], file.rpartition("/")[2]}:
                known.setdefault(name, []).append(file)
    return known | {file: [file] for files in images.files.values() for file in files}
