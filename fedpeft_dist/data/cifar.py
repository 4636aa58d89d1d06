"""CIFAR-10 and CIFAR-100 from the pickles of their python version, read without letting a pickle run code.

Shapes: S samples of a file; images are [3, 32, 32].
"""

import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fedpeft_dist.data.datasets import Contents, Part
from fedpeft_dist.data.source import TorchvisionSource, check_labels, unreadable

SHAPE = (3, 32, 32)


class CifarSource(TorchvisionSource):
    """Either version. `files` names the training batches, then the test batch, then the classes' names."""

    labels_key: ClassVar[bytes]
    """The key of a batch's labels."""
    num_train = 50_000
    names_key: ClassVar[bytes]
    """The key of the classes' names."""

    def fetch(self, folder: Path) -> None:
        from torchvision import datasets

        getattr(datasets, self.config.name.upper())(folder, download=True)  # CIFAR10 or CIFAR100

    def read(self) -> Contents:
        *train, test, meta = self.paths
        try:
            class_names = tuple(text.decode() for text in load_plain(meta)[self.names_key])
        except Exception as error:  # a damaged pickle can fail in any way
            raise unreadable(meta, error) from None
        self.check_classes(class_names, meta)
        return Contents(class_names, self._read_part(train), self._read_part([test]))

    def _read_part(self, paths: list[Path]) -> Part:
        images, labels = zip(*map(self._read_batch, paths))
        return Part((sum(map(len, labels)), *SHAPE), np.concatenate(labels), lambda: iter(images))

    def _read_batch(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [S, 3, 32, 32] and int64 [S]."""
        try:
            content = load_plain(path)
            images, labels = content[b"data"], np.asarray(content[self.labels_key], dtype=np.int64)
            shape = (len(labels), np.prod(SHAPE))
            if not (isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape == shape):
                raise ValueError(f"'data' must be uint8 of shape [{len(labels)}, 3072], one row a label")
        except Exception as error:  # a damaged pickle can fail in any way
            raise unreadable(path, error) from None
        check_labels(labels, self.classes, path)
        return images.reshape(-1, *SHAPE), labels


class Cifar10Source(CifarSource):
    files = tuple(
        f"cifar-10-batches-py/{name}"
        for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta")
    )
    classes, labels_key, names_key = 10, b"labels", b"label_names"


class Cifar100Source(CifarSource):
    files = ("cifar-100-python/train", "cifar-100-python/test", "cifar-100-python/meta")
    classes, labels_key, names_key = 100, b"fine_labels", b"fine_label_names"


class _PlainUnpickler(pickle.Unpickler):
    """Builds numpy arrays and Python's plain types, and nothing else."""

    # Python 3 writes bytes as a call of `encode` in a pickle that Python 2 should read.
    ALLOWED = (("multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"))

    def find_class(self, module: str, name: str) -> Any:
        own = module.removeprefix("numpy.core.").removeprefix("numpy._core.")
        if (own, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only arrays and plain types are allowed")
        # numpy 2 has moved its core and warns about the old place.
        return np.ndarray.__reduce__(np.empty(0))[0] if own == "multiarray" else super().find_class(module, name)


def load_plain(path: Path) -> Any:
    """Reads a pickle of arrays and plain types; text of Python 2 becomes bytes.

    Raises:
        Exception: of any class, for a file that is damaged or asks for other types.
    """
    with open(path, "rb") as file:
        return _PlainUnpickler(file, encoding="bytes").load()
