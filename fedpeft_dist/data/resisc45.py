"""NWPU-RESISC45 (Cheng et al. 2017): class folders without a split of their own; it is drawn, or given as lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import Resisc45Config
from fedpeft_dist.data.image_files import DECODING, choose_form, encoded_files
from fedpeft_dist.data.image_folder import ClassFolders, folder_part, list_images, passed_over_notes
from fedpeft_dist.data.source import Contents, Source, check_num_classes, printable
from fedpeft_dist.lanes.random import derive_seed, permutation

FOLDER = "NWPU-RESISC45"
NUM_CLASSES = 45
SIDE = 256
"""What all of its images have; one that has not is brought to it."""


def resisc45_source(config: Resisc45Config) -> Source:
    """
    Raises:
        ConfigError: folders that are missing, a share that splits nothing off, lists that do not fit the files.
    """
    folder = Path(config.root) / FOLDER
    if not folder.is_dir():
        raise ConfigError(
            f"data.name: 'resisc45' needs its {NUM_CLASSES} class folders in '{folder}' (data.root: '{config.root}'), "
            "and there is no such folder; the archive has to be downloaded by hand"
        )
    images = list_images(folder)
    check_num_classes("data.name: 'resisc45'", NUM_CLASSES, f"'{folder}'", images.class_names)
    if config.train_list is not None:
        train, test = read_lists(images, config)
    else:
        train, test = draw_split(images.files, config.test_share, config.split_seed)
    return Source([DECODING, images.identity, train, test], lambda: _read(images, train, test))


def draw_split(files: Mapping[str, Sequence[str]], share: float, seed: int) -> tuple[list[str], list[str]]:
    """(train, test): of every class, the same share for testing, at least one image and never all.

    A class's draw depends on the seed, its name and its number of images alone.

    Raises:
        ConfigError: a class too small to be split, a share of 0.
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
        ConfigError: a file that cannot be read, an image that is missing or named twice, a class without an image.
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
        # A byte order mark is left out; names that are no UTF-8 stay what they are on the disk.
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
    """What a list may call the images, each with the files of that name.

    An image's own name tells its class in this data set, so lists without folders are in use too.
    """
    known: dict[str, list[str]] = {}
    for files in images.files.values():
        for file in files:
            for name in {file, file.partition("/")[2], file.rpartition("/")[2]}:
                known.setdefault(name, []).append(file)
    return known | {file: [file] for files in images.files.values() for file in files}


def _read(images: ClassFolders, train: Sequence[str], test: Sequence[str]) -> Contents:
    form = choose_form(encoded_files(images.folder, [*train, *test]), SIDE)
    parts = [folder_part(images.folder, names, images.files, form) for names in (train, test)]
    texts = {"train.txt": "\n".join(train) + "\n", "test.txt": "\n".join(test) + "\n"}
    notes = passed_over_notes(images) + form.notes
    return Contents(images.class_names, *parts, texts, form.cropped, notes)
