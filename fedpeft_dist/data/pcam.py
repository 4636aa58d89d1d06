"""PatchCamelyon from its HDF5 files, read a few images at a time.

Shapes: S samples of a split; the files hold images as [96, 96, 3].
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft_dist.data.datasets import Contents, Part
from fedpeft_dist.data.source import TorchvisionSource, check_labels, unreadable

CLASS_NAMES = ("normal", "tumor")
SIDE = 96
CHUNK = 512


class PcamSource(TorchvisionSource):
    """Each split has a file of images (x) and a file of labels (y)."""

    files = tuple(f"pcam/camelyonpatch_level_2_split_{split}_{kind}.h5" for split in ("train", "test") for kind in "xy")
    classes = len(CLASS_NAMES)
    num_train = 262_144

    def fetch(self, folder: Path) -> None:
        from torchvision.datasets import PCAM

        for split in ("train", "test"):
            PCAM(folder, split, download=True)

    def read(self) -> Contents:
        train_images, train_labels, test_images, test_labels = self.paths
        return Contents(CLASS_NAMES, _read_part(train_images, train_labels), _read_part(test_images, test_labels))


def _read_part(images_file: Path, labels_file: Path) -> Part:
    with _opened(labels_file) as file:
        labels = np.asarray(file["y"]).astype(np.int64)
        if labels.shape[1:] != (1, 1, 1):
            raise ValueError(f"'y' must have the shape [S, 1, 1, 1], not {list(labels.shape)}")
    labels = labels.reshape(-1)
    check_labels(labels, len(CLASS_NAMES), labels_file)
    with _opened(images_file) as file:
        if file["x"].shape != (len(labels), SIDE, SIDE, 3) or file["x"].dtype != np.uint8:
            raise ValueError(f"'x' must be uint8 of shape [{len(labels)}, {SIDE}, {SIDE}, 3], one image a label")

    def chunks() -> Iterator[np.ndarray]:
        with _opened(images_file) as file:  # a chunk in the middle of the file may be damaged
            for start in range(0, len(labels), CHUNK):
                yield file["x"][start : start + CHUNK].transpose(0, 3, 1, 2)

    return Part((len(labels), 3, SIDE, SIDE), labels, chunks)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open HDF5 file. Errors while it is read name the file."""
    import h5py

    try:
        with h5py.File(path) as file:
            yield file
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise unreadable(path, error) from None
