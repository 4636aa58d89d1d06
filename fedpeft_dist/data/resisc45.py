"""NWPU-RESISC45 (Cheng et al. 2017): class folders without a published split. The split is drawn or given as lists."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import Resisc45Config
from fedpeft_dist.data.datasets import Contents
from fedpeft_dist.data.image_files import DECODING, encoded_contents
from fedpeft_dist.data.image_folder import ClassFolders, list_images, passed_over_notes
from fedpeft_dist.data.source import FileSource, printable
from fedpeft_dist.lanes.random import derive_seed, permutation

FOLDER = "NWPU-RESISC45"
SIDE = 256
"""The images' width and height in pixels. An image of another size is resized and cropped."""


class Resisc45Source(FileSource):
    config: Resisc45Config
    classes = 45

    def identity(self) -> Any:
        return [DECODING, self.images.identity, *self.split]

    @cached_property
    def images(self) -> ClassFolders:
        folder = self.root / FOLDER
        if not folder.is_dir():
            raise ConfigError(
                f"data.name: 'resisc45' needs its {self.classes} class folders in '{folder}' (data.root: "
                f"'{self.root}'), and there is no such folder; the archive has to be downloaded by hand"
            )
        images = list_images(folder)
        self.check_classes(images.class_names, folder)
        return images

    @cached_property
    def split(self) -> tuple[list[str], list[str]]:
        """The training images and the test images, as `<class>/<file>`."""
        if self.config.train_list is not None:
            return read_lists(self.images, self.config)
        return draw_split(self.images.files, self.config.test_share, self.config.split_seed)

    def read(self) -> Contents:
        texts = {f"{split}.txt": "\n".join(names) + "\n" for split, names in zip(("train", "test"), self.split)}
        parts = [self.images.part(names) for names in self.split]
        return encoded_contents(self.images.class_names, parts, SIDE, passed_over_notes(self.images), texts)


def draw_split(files: Mapping[str, Sequence[str]], share: float, seed: int) -> tuple[list[str], list[str]]:
    """(train, test): the same share of every class goes to testing, at least one image and never all.

    The draw of a class depends only on the seed, the class's name and its number of images.
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
    """(train, test), as the config's text files name them."""
    # The files behind each name that a list may use. An image's own name tells its class, so lists without folders are
    # in use too.
    known, files = defaultdict(set), list(chain.from_iterable(images.files.values()))
    for file in files:
        known[file.partition("/")[2]].add(file)
        known[file.rpartition("/")[2]].add(file)
    known |= {file: {file} for file in files}
    train, test = (_read_list(images, known, key, getattr(config, key)) for key in ("train_list", "test_list"))
    if both := set(train) & set(test):
        raise ConfigError(
            f"data.train_list and data.test_list: {min(both)!r} stands in both ({len(both)} images do); "
            "an image is for training or for testing"
        )
    return train, test


def _read_list(images: ClassFolders, known: Mapping[str, set[str]], key: str, path: str) -> list[str]:
    where = f"data.{key}: '{path}'"
    try:
        # A byte order mark is dropped. Names that are not UTF-8 stay the same bytes as on the disk.
        text = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ConfigError(f"{where} cannot be read ({error})") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if missing := [line for line in lines if len(known.get(line, ())) != 1]:
        found = known.get(missing[0], ())
        problem = f"{len(found)} files have in" if found else "is not in"
        raise ConfigError(
            f"{where} names '{printable(missing[0])}', which {problem} '{images.folder}' ({len(missing)} such lines)"
        )
    names = sorted({file for line in lines for file in known[line]})
    if len(names) != len(lines):
        raise ConfigError(f"{where} names {len(lines) - len(names)} image(s) twice")
    if lacking := sorted(set(images.files) - {name.partition("/")[0] for name in names}):
        raise ConfigError(f"{where} names no image of class {lacking[0]!r} ({len(lacking)} such classes)")
    return names
