"""Small data sets in the formats that they have on disk, made of random pixels.

Shapes: S samples of a split.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

from fedpeft_dist.config.schema import DataConfig, RunConfig
from fedpeft_dist.data.resisc45 import FOLDER as RESISC45
from tests.tiny import tiny_tree


def data_config(**data: Any) -> DataConfig:
    return RunConfig.model_validate({"data": data, "federation": {"cohort": 1}}).data


def run_tree(output: Path, **data: Any) -> dict[str, Any]:
    """The tree of a small run over a data set."""
    return tiny_tree(
        method={"name": "bias"},
        data=data,
        federation={"cohort": 3},
        client={"batch_size": 7},
        output={"root": str(output), "name": "run"},
    )


def write_cifar10(root: Path, num_train: int = 50, num_test: int = 20) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Five training batches, a test batch and the names. Returns both splits: uint8 [S, 3, 32, 32], int64 [S]."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    train, test = random_split(num_train, 10, seed=0), random_split(num_test, 10, seed=1)
    for number, part in enumerate(np.array_split(np.arange(num_train), 5), start=1):
        own = {b"data": train[0][part].reshape(len(part), -1), b"labels": train[1][part].tolist()}
        dump(own, folder / f"data_batch_{number}")
    dump({b"data": test[0].reshape(num_test, -1), b"labels": test[1].tolist()}, folder / "test_batch")
    dump({b"label_names": [b"class%d" % k for k in range(10)], b"num_vis": 3072}, folder / "batches.meta")
    return {"train": train, "test": test}


def write_cifar100(
    root: Path, num_train: int = 200, num_test: int = 50, num_classes: int = 100
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Writes the three files. Returns the same as `write_cifar10`."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    splits = {"train": random_split(num_train, 100, seed=0), "test": random_split(num_test, 100, seed=1)}
    for name, (images, labels) in splits.items():
        own = {b"data": images.reshape(len(images), -1), b"fine_labels": labels.tolist(), b"filenames": [b"a.png"]}
        dump(own | {b"coarse_labels": (labels // 5).tolist()}, folder / name)
    dump({b"fine_label_names": [b"class%d" % k for k in range(num_classes)]}, folder / "meta")
    return splits


def dump(content: Mapping[bytes, Any], path: Path) -> None:
    """Writes a pickle as similar to the originals of Python 2 as Python 3 can."""
    path.write_bytes(pickle.dumps(dict(content), protocol=2))


def random_split(size: int, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [S, 3, 32, 32] and int64 [S] in which every class occurs where there are enough samples."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (size, 3, 32, 32), dtype=np.uint8), rng.permutation(np.arange(size) % num_classes)


def write_pcam(root: Path, num_train: int = 30, num_test: int = 10) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns both splits: uint8 [S, 96, 96, 3], int64 [S]."""
    folder = root / "pcam"
    folder.mkdir(parents=True)
    splits = {}
    for seed, (name, size) in enumerate({"train": num_train, "test": num_test}.items()):
        rng = np.random.default_rng(seed)
        images, labels = rng.integers(0, 256, (size, 96, 96, 3), dtype=np.uint8), np.arange(size) % 2
        with h5py.File(folder / f"camelyonpatch_level_2_split_{name}_x.h5", "w") as file:
            file.create_dataset("x", data=images, chunks=(4, 96, 96, 3), compression="gzip")
        with h5py.File(folder / f"camelyonpatch_level_2_split_{name}_y.h5", "w") as file:
            file.create_dataset("y", data=labels.reshape(-1, 1, 1, 1).astype(np.uint8))
        splits[name] = images, labels
    return splits


def write_resisc45(root: Path, per_class: int = 5, num_classes: int = 45, side: int = 16) -> Path:
    """Class folders of JPEG files of one flat colour each. Returns their folder."""
    folder, rng = root / RESISC45, np.random.default_rng(0)
    for number in range(num_classes):
        name = f"scene_{number:02d}"
        (folder / name).mkdir(parents=True)
        for image in range(1, per_class + 1):
            pixels = np.full((side, side, 3), rng.integers(0, 256, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{name}_{image:03d}.jpg")
    return folder


def write_image_folder(
    root: Path,
    classes: tuple[str, ...] = ("ape", "bee"),
    per_class: int = 3,
    size: tuple[int, int] = (20, 12),
    mode: str = "RGB",
) -> None:
    """PNG files of random pixels, (width, height) as `size` says."""
    rng = np.random.default_rng(0)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(per_class):
                pixels = rng.integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
