"""A data set, decoded as uint8 images (`Dataset`) or about to be read from its files (`Contents`).

Shapes: S samples of a split, C channels, H x W pixels, n samples of a chunk.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from fedpeft_dist.config.errors import ConfigError

FINGERPRINT_IMAGES = 256
"""The approximate number of images of a split that its fingerprint looks at."""
DIGEST_IMAGES = 1024
"""Images read at a time for a digest of all of them."""


@dataclass(frozen=True)
class ImageSet:
    """One decoded split."""

    images: torch.Tensor
    """uint8 [S, C, H, W], usually a read-only memory map. More than S images where `rows` picks some of them."""
    labels: torch.Tensor
    """int64 [S]."""
    groups: torch.Tensor | None = None
    """int64 [S]: the natural client of each sample, if the data set has natural clients."""
    rows: torch.Tensor | None = None
    """int64 [S]: the image of each sample. None: sample k is image k."""

    def __len__(self) -> int:
        return len(self.labels)

    def places(self, samples: torch.Tensor) -> torch.Tensor:
        """The places of samples (int64 [n]) among the images: int64 [n]."""
        return samples if self.rows is None else self.rows[samples]

    def subset(self, size: int | None, seed: int) -> "ImageSet":
        """A random subset in the original order, which shares the images; everything if the size is None.

        Raises:
            ConfigError: the split has fewer samples.
        """
        if size is None:
            return self
        if size > len(self):
            raise ConfigError(f"data.max_train: {size} is more than the {len(self)} training samples there are")
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:size].sort().values
        groups = None if self.groups is None else self.groups[chosen]
        return ImageSet(self.images, self.labels[chosen], groups, self.places(chosen))

    def digest(self, step: int = 1) -> bytes:
        """SHA-256 of all labels and groups, and of every `step`th image. Takes 0.3 s for all of CIFAR-100's images."""
        digest = hashlib.sha256(str(tuple(self.images.shape[1:])).encode())
        digest.update(self.labels.numpy().tobytes())
        if self.groups is not None:
            digest.update(self.groups.numpy().tobytes())
        for samples in torch.arange(0, len(self), step).split(DIGEST_IMAGES):
            digest.update(self.images[self.places(samples)].numpy().tobytes())
        return digest.digest()


@dataclass(frozen=True)
class Dataset:
    """Both decoded splits and the names of the classes."""

    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    cropped: bool = False
    """Whether the images were resized on the shorter side and cropped when they were decoded."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def fingerprint(self) -> str:
        """A digest of the classes, all labels and some images, by which a run recognises its data."""
        digest = hashlib.sha256("\n".join(self.class_names).encode())
        for split in (self.train, self.test):
            digest.update(split.digest(step=max(1, len(split) // FINGERPRINT_IMAGES)))
        return digest.hexdigest()


@dataclass(frozen=True)
class Part:
    """One split that is about to be read from its files."""

    shape: tuple[int, int, int, int]
    """(S, C, H, W)."""
    labels: np.ndarray
    """int64 [S]."""
    chunks: Callable[[], Iterator[np.ndarray]]
    """Starts reading: yields uint8 [n, C, H, W], all samples in order."""
    groups: np.ndarray | None = None
    """int64 [S]: the natural client of each sample, if the data set has natural clients."""


@dataclass(frozen=True)
class Contents:
    """Both splits of a data set that is about to be read from its files."""

    class_names: tuple[str, ...]
    train: Part
    test: Part
    texts: Mapping[str, str] = field(default_factory=dict)
    """File name to text: other files to keep beside the images, such as the lists of a random split."""
    cropped: bool = False
    """Whether the images are resized on the shorter side and cropped, because their sizes differ."""
    notes: tuple[str, ...] = ()
    """Lines for the user, printed once when the images are decoded."""
