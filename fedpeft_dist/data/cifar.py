"""CIFAR-10 and CIFAR-100 from the pickles of their python version, read without letting a pickle run code.

Shapes: S samples of a file; images are [3, 32, 32].
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft_dist.config.schema import Cifar10Config, Cifar100Config
from fedpeft_dist.data.source import (
    Contents,
    Part,
    Source,
    check_labels,
    check_num_classes,
    require_files,
    stamp,
    unreadable,
)

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
CHUNK = 4096


@dataclass(frozen=True)
class Layout:
    """Where a version keeps what."""

    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: bytes
    names: bytes
    num_classes: int


CIFAR10 = Layout(
    folder="cifar-10-batches-py",
    train=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test="test_batch",
    meta="batches.meta",
    labels=b"labels",
    names=b"label_names",
    num_classes=10,
)
CIFAR100 = Layout(
    folder="cifar-100-python",
    train=("train",),
    test="test",
    meta="meta",
    labels=b"fine_labels",
    names=b"fine_label_names",
    num_classes=100,
)
LAYOUTS = {Cifar10Config: CIFAR10, Cifar100Config: CIFAR100}


def cifar_source(config: Cifar10Config | Cifar100Config) -> Source:
    """
    Raises:
        ConfigError: files that are missing.
    """
    layout, root = LAYOUTS[type(config)], Path(config.root)
    folder = root / layout.folder
    paths = [folder / name for name in (*layout.train, layout.test, layout.meta)]
    require_files(config, paths)
    return Source(stamp(paths, root), lambda: _read(config.name, layout, folder))


def _read(name: str, layout: Layout, folder: Path) -> Contents:
    meta = folder / layout.meta
    try:
        class_names = tuple(text.decode() for text in load_plain(meta)[layout.names])
    except Exception as error:  # a pickle that is damaged fails in any way there is
        raise unreadable(meta, error) from None
    check_num_classes(f"data.name: {name!r}", layout.num_classes, f"'{meta}'", class_names)
    train = _part([folder / file for file in layout.train], layout)
    return Contents(class_names, train, _part([folder / layout.test], layout))


def _part(paths: list[Path], layout: Layout) -> Part:
    files = [_read_batch(path, layout) for path in paths]
    labels = np.concatenate([labels for _, labels in files])

    def chunks() -> Iterator[np.ndarray]:
        for images, _ in files:
            for start in range(0, len(images), CHUNK):
                yield images[start : start + CHUNK]

    return Part((len(labels), *SHAPE), labels, chunks)


def _read_batch(path: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [S, 3, 32, 32] and int64 [S]."""
    try:
        content = load_plain(path)
        images, labels = content[b"data"], np.asarray(content[layout.labels], dtype=np.int64)
        if not (isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape == (len(labels), PIXELS)):
            raise ValueError(f"'data' must be uint8 of shape [{len(labels)}, {PIXELS}], one row a label")
    except Exception as error:  # as above
        raise unreadable(path, error) from None
    check_labels(labels, layout.num_classes, f"'{path}'")
    return images.reshape(-1, *SHAPE), labels


class _PlainUnpickler(pickle.Unpickler):
    """Builds numpy arrays and Python's plain types, and nothing else."""

    # `encode` makes bytes of text: what Python 3 writes for bytes where a pickle is to be read by Python 2.
    ALLOWED = frozenset(
        {
            ("multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        own = module.removeprefix("numpy.core.").removeprefix("numpy._core.")
        if (own, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only arrays and plain types are allowed")
        # numpy 2 has moved its core, and warns about the old place.
        return np.ndarray.__reduce__(np.empty(0))[0] if own == "multiarray" else super().find_class(module, name)


def load_plain(path: Path) -> Any:
    """A pickle of arrays and plain types; text of Python 2 is bytes.

    Raises:
        Exception: of any kind, for a file that is damaged or asks for more.
    """
    with open(path, "rb") as file:
        return _PlainUnpickler(file, encoding="bytes").load()
