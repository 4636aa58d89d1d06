"""PatchCamelyon from its HDF5 files, a few images at a time.

Shapes: S samples of a split; images are stored there as [96, 96, 3].
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fedpeft_dist.config.schema import PcamConfig
from fedpeft_dist.data.source import Contents, Part, Source, check_labels, require_files, stamp, unreadable

FOLDER = "pcam"
FILE = "camelyonpatch_level_2_split_{split}_{kind}.h5"
CLASS_NAMES = ("normal", "tumor")
SIDE = 96
CHUNK = 512


def pcam_source(config: PcamConfig) -> Source:
    """
    Raises:
        ConfigError: files that are missing.
    """
    root = Path(config.root)
    paths = [pcam_file(root, split, kind) for split in ("train", "test") for kind in "xy"]
    require_files(config, paths)
    return Source(stamp(paths, root), lambda: Contents(CLASS_NAMES, _part(root, "train"), _part(root, "test")))


def pcam_file(root: Path, split: str, kind: str) -> Path:
    """Where the images ("x") or the labels ("y") of a split lie."""
    return root / FOLDER / FILE.format(split=split, kind=kind)


def _part(root: Path, split: str) -> Part:
    import h5py

    images_file, labels_file = (pcam_file(root, split, kind) for kind in "xy")
    try:
        with h5py.File(labels_file) as file:
            labels = np.asarray(file["y"]).astype(np.int64)
            if labels.shape[1:] != (1, 1, 1):
                raise ValueError(f"'y' must have the shape [S, 1, 1, 1], not {list(labels.shape)}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise unreadable(labels_file, error) from None
    labels = labels.reshape(-1)
    check_labels(labels, len(CLASS_NAMES), f"'{labels_file}'")
    try:
        with h5py.File(images_file) as file:
            if file["x"].shape != (len(labels), SIDE, SIDE, 3) or file["x"].dtype != np.uint8:
                raise ValueError(f"'x' must be uint8 of shape [{len(labels)}, {SIDE}, {SIDE}, 3], one image a label")
    except (OSError, KeyError, AttributeError, ValueError) as error:
        raise unreadable(images_file, error) from None

    def chunks() -> Iterator[np.ndarray]:
        try:
            with h5py.File(images_file) as file:
                for start in range(0, len(labels), CHUNK):
                    yield file["x"][start : start + CHUNK].transpose(0, 3, 1, 2)
        except OSError as error:  # a damaged chunk in the middle
            raise unreadable(images_file, error) from None

    return Part((len(labels), 3, SIDE, SIDE), labels, chunks)
