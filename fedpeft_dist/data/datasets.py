"""Images and labels, decoded, as uint8; every data set is a function from its config section to this.

Shapes: S samples of a set, C channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import DigitsConfig, Glyphs100Config, GlyphsConfig, SyntheticConfig
from fedpeft_dist.lanes.random import derive_seed

FINGERPRINT_IMAGES = 256
"""About how many of a split's images its fingerprint looks at."""
DIGEST_IMAGES = 1024
"""How many images are read at a time where all of them are."""


@dataclass(frozen=True)
class ImageSet:
    """One split of a data set."""

    images: torch.Tensor
    """uint8 [S, C, H, W]; more than S images where `rows` picks some of them. As a rule a read-only memory map."""
    labels: torch.Tensor
    """int64 [S]."""
    groups: torch.Tensor | None = None
    """int64 [S]: whose sample it is, where the data set knows natural clients."""
    rows: torch.Tensor | None = None
    """int64 [S]: which of the images each sample is; None where sample k is image k."""

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> bytes:
        """SHA-256 of all labels, groups and images. Reads everything: 0.3 s for CIFAR-100's training split."""
        digest = self._digest_of_labels()
        for start in range(0, len(self), DIGEST_IMAGES):
            digest.update(self._images(torch.arange(start, min(start + DIGEST_IMAGES, len(self)))))
        return digest.digest()

    def sampled_digest(self) -> bytes:
        """The same of all labels and groups, but of some images only."""
        digest = self._digest_of_labels()
        digest.update(self._images(torch.arange(0, len(self), max(1, len(self) // FINGERPRINT_IMAGES))))
        return digest.digest()

    def _digest_of_labels(self) -> hashlib._Hash:
        digest = hashlib.sha256(str(tuple(self.images.shape[1:])).encode())
        digest.update(self.labels.numpy().tobytes())
        if self.groups is not None:
            digest.update(self.groups.numpy().tobytes())
        return digest

    def _images(self, samples: torch.Tensor) -> bytes:
        return self.images[samples if self.rows is None else self.rows[samples]].numpy().tobytes()


@dataclass(frozen=True)
class Dataset:
    """Both splits of a data set and the names of its classes."""

    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    cropped: bool = False
    """Whether the images were resized on the shorter side and cropped when they were decoded."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def fingerprint(self) -> str:
        """A digest of the classes, all labels and some of the images of both splits, by which a run knows its data."""
        digest = hashlib.sha256("\n".join(self.class_names).encode())
        for split in (self.train, self.test):
            digest.update(split.sampled_digest())
        return digest.hexdigest()


def load_digits(config: DigitsConfig, seed: int) -> Dataset:
    """scikit-learn's handwritten digits, 8 x 8 in 17 grey levels: the same stratified split for every seed."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    digits = load()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    parts = train_test_split(range(len(labels)), test_size=500, stratify=digits.target, random_state=0)
    train, test = (ImageSet(images[part], labels[part]) for part in parts)
    return Dataset(train, test, tuple(str(digit) for digit in range(10)))


def load_glyphs(config: GlyphsConfig, seed: int) -> Dataset:
    """Printed letters; a font is a natural client. The letters' distortions come from the run's seed."""
    from fedpeft_dist.data.glyphs import render_dataset

    num_test = max(1, config.images_per_letter // 4)
    train = render_dataset(config.alphabet, config.images_per_letter, config.image_size, seed)
    test = render_dataset(config.alphabet, num_test, config.image_size, derive_seed(seed, "test"))
    assert train.class_names == test.class_names
    return Dataset(
        ImageSet(train.images, train.labels, train.font_ids),
        ImageSet(test.images, test.labels, test.font_ids),
        train.class_names,
    )


def load_glyphs100(config: Glyphs100Config, seed: int) -> Dataset:
    """Greek and Cyrillic letters, tested on a family of fonts of its own: the same images for every seed."""
    from fedpeft_dist.data.glyphs100 import render_split

    train = render_split(True, config.images_per_letter, config.image_size)
    test = render_split(False, config.test_images_per_letter, config.image_size)
    return Dataset(
        ImageSet(train.images, train.labels, train.font_ids),
        ImageSet(test.images, test.labels, test.font_ids),
        train.class_names,
    )


def load_synthetic(config: SyntheticConfig, seed: int) -> Dataset:
    """Uniform noise with random labels."""
    generator = torch.Generator().manual_seed(seed)

    def random_set(size: int) -> ImageSet:
        shape = (size, config.channels, config.image_size, config.image_size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return ImageSet(images, torch.randint(0, config.classes, (size,), generator=generator))

    return Dataset(
        random_set(config.num_train), random_set(config.num_test), tuple(str(c) for c in range(config.classes))
    )


def subsample(images: ImageSet, size: int | None, seed: int) -> ImageSet:
    """A random subset, in the original order, of the same images, not copied; all of it where size is None.

    Raises:
        ConfigError: fewer samples than asked for.
    """
    if size is None:
        return images
    if size > len(images):
        raise ConfigError(f"data.max_train: {size} is more than the {len(images)} training samples there are")
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:size].sort().values
    groups = None if images.groups is None else images.groups[chosen]
    rows = chosen if images.rows is None else images.rows[chosen]
    return ImageSet(images.images, images.labels[chosen], groups, rows)
