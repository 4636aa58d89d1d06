"""Augmentation against a loop over samples that is driven by the same keyed draws."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from scipy.stats import chi2

from fedpeft_dist.config.schema import SyntheticConfig
from fedpeft_dist.data import augment
from fedpeft_dist.data.augment import make_augmentation, random_crop, random_flip
from fedpeft_dist.lanes.random import fold_in, uniform


def images_and_keys(rows: int, channels: int = 3, height: int = 6, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(rows, channels, height, width, generator=torch.Generator().manual_seed(0))
    return images, fold_in(torch.tensor(17), torch.arange(rows))


def draw(key: torch.Tensor, site: int) -> float:
    return float(uniform(fold_in(key, site)))


def flip_one(image: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    if draw(key, augment._FLIP) >= 0.5:
        return image
    mirrored = torch.empty_like(image)
    width = image.shape[-1]
    for x in range(width):
        mirrored[..., x] = image[..., width - 1 - x]
    return mirrored


def crop_one(image: torch.Tensor, key: torch.Tensor, padding: int) -> torch.Tensor:
    """The window of the padded image that starts at a drawn offset, pixel by pixel."""
    _, height, width = image.shape
    top = int(draw(key, augment._CROP_Y) * (2 * padding + 1)) - padding
    left = int(draw(key, augment._CROP_X) * (2 * padding + 1)) - padding
    cropped = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            if 0 <= y + top < height and 0 <= x + left < width:
                cropped[:, y, x] = image[:, y + top, x + left]
    return cropped


def test_flip_equals_a_loop() -> None:
    images, keys = images_and_keys(30)
    expected = torch.stack([flip_one(image, key) for image, key in zip(images, keys)])
    assert torch.equal(random_flip(images, keys), expected)
    assert not torch.equal(expected, images)


@pytest.mark.parametrize("padding", [1, 2, 4, 7])
def test_crop_equals_a_loop(padding: int) -> None:
    images, keys = images_and_keys(30)
    expected = torch.stack([crop_one(image, key, padding) for image, key in zip(images, keys)])
    found = random_crop(images, keys, padding)
    assert found.shape == images.shape
    assert torch.equal(found, expected)


def test_crop_flip_crops_and_then_flips() -> None:
    images, keys = images_and_keys(30)
    function = make_augmentation(SyntheticConfig(name="synthetic", augment="crop_flip", crop_padding=3))
    expected = torch.stack([flip_one(crop_one(image, key, 3), key) for image, key in zip(images, keys)])
    assert torch.equal(function(images, keys), expected)


def test_the_config_names_the_augmentation() -> None:
    images, keys = images_and_keys(8)
    assert make_augmentation(SyntheticConfig(name="synthetic", augment="none")) is None
    flip = make_augmentation(SyntheticConfig(name="synthetic", augment="flip"))
    assert torch.equal(flip(images, keys), random_flip(images, keys))


@pytest.mark.parametrize("kind", ["flip", "crop_flip"])
def test_a_sample_does_not_depend_on_its_batch(kind: str) -> None:
    function = make_augmentation(SyntheticConfig(name="synthetic", augment=kind, crop_padding=2))
    images, keys = images_and_keys(12)
    together = function(images, keys)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(function(images[order], keys[order]), together[order])
    alone = torch.cat([function(images[i : i + 1], keys[i : i + 1]) for i in range(12)])
    assert torch.equal(alone, together)


def test_flips_and_offsets_are_uniform_and_independent() -> None:
    """Each image holds its pixels' coordinates, so that the draw can be read off the result."""
    rows, padding, side = 5000, 1, 5
    y, x = torch.meshgrid(torch.arange(1, side + 1), torch.arange(1, side + 1), indexing="ij")
    images = torch.stack([y, x]).float().expand(rows, 2, side, side)
    keys = fold_in(torch.tensor(3), torch.arange(rows))
    function = make_augmentation(SyntheticConfig(name="synthetic", augment="crop_flip", crop_padding=padding))
    centre = function(images, keys)[:, :, 2, 1:4].long()
    flipped = centre[:, 1, 0] > centre[:, 1, 2]
    seen = Counter(zip(flipped.tolist(), (centre[:, 0, 1] - 3).tolist(), (centre[:, 1, 1] - 3).tolist()))
    cells = [(f, dy, dx) for f in (False, True) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    assert set(seen) == set(cells)
    expected = rows / len(cells)
    statistic = sum((seen[cell] - expected) ** 2 / expected for cell in cells)
    assert 1e-4 < chi2.sf(statistic, len(cells) - 1) < 1 - 1e-4
