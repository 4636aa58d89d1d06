"""Augmentation against a loop over samples that is driven by the same keyed draws."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chi2, kstest
from scipy.stats import uniform as uniform_distribution
from torch.nn import functional

from fedpeft_dist.config.schema import SyntheticConfig
from fedpeft_dist.data import augment
from fedpeft_dist.data.augment import (
    Transform,
    draw_windows,
    make_transform,
    random_crop,
    random_flip,
    resize,
    resize_windows,
)
from fedpeft_dist.lanes.random import fold_in, uniform


def transform_of(augment: str, image_size: int, padding: int = 4, mode: str = "bilinear") -> Transform:
    config = SyntheticConfig(name="synthetic", augment=augment, image_size=image_size, crop_padding=padding)
    return make_transform(config, mode)


def images_and_keys(rows: int, channels: int = 3, height: int = 6, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
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
    function = transform_of("crop_flip", 6, padding=3)
    expected = torch.stack([flip_one(crop_one(image, key, 3), key) for image, key in zip(images, keys)])
    assert torch.equal(function(images, keys), expected)


def test_the_config_names_the_augmentation() -> None:
    images, keys = images_and_keys(8)
    assert torch.equal(transform_of("none", 6)(images, keys), images)
    assert torch.equal(transform_of("flip", 6)(images, keys), random_flip(images, keys))
    assert torch.equal(transform_of("flip", 6)(images, None), images)
    windows = draw_windows((6, 6), keys, (0.08, 1.0), (3 / 4, 4 / 3))
    expected = random_flip(resize_windows(images, windows, 9, "bilinear"), keys)
    assert torch.equal(transform_of("resized_crop_flip", 9)(images, keys), expected)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("image_size", [4, 6, 11])
@pytest.mark.parametrize("kind", ["flip", "crop_flip", "resized_crop_flip"])
def test_a_sample_does_not_depend_on_its_batch(kind: str, image_size: int, mode: str) -> None:
    function = transform_of(kind, image_size, padding=2, mode=mode)
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
    function = transform_of("crop_flip", side, padding)
    centre = function(images, keys)[:, :, 2, 1:4].long()
    flipped = centre[:, 1, 0] > centre[:, 1, 2]
    seen = Counter(zip(flipped.tolist(), (centre[:, 0, 1] - 3).tolist(), (centre[:, 1, 1] - 3).tolist()))
    cells = [(f, dy, dx) for f in (False, True) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    assert set(seen) == set(cells)
    expected = rows / len(cells)
    statistic = sum((seen[cell] - expected) ** 2 / expected for cell in cells)
    assert 1e-4 < chi2.sf(statistic, len(cells) - 1) < 1 - 1e-4


@pytest.mark.parametrize("size", [5, 20, 33])
def test_bicubic_resizing_is_antialiased_and_stays_in_range(size: int) -> None:
    images = (torch.rand(4, 3, 20, 20, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    expected = torch.stack([pillow_resize(image, size) for image in images])
    found = resize(images, size, "bicubic")
    assert found.min() >= 0
    assert found.max() <= 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def pillow_resize(image: torch.Tensor, size: int) -> torch.Tensor:
    channels = [Image.fromarray(channel.numpy()) for channel in image]
    resized = [np.asarray(channel.resize((size, size), Image.Resampling.BICUBIC)) for channel in channels]
    return torch.from_numpy(np.stack(resized)).clamp(0, 1)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [4, 8, 23])
def test_windows_are_resized_as_a_crop_would_be(size: int, mode: str) -> None:
    images = torch.rand(40, 3, 17, 21, generator=torch.Generator().manual_seed(3))
    keys = fold_in(torch.tensor(5), torch.arange(40))
    windows = draw_windows((17, 21), keys, (0.05, 1.0), (0.5, 2.0))
    found = resize_windows(images, windows, size, mode)
    for image, (top, left, height, width), mine in zip(images, windows.tolist(), found):
        crop = image[:, top : top + height, left : left + width].unsqueeze(0).double()
        theirs = functional.interpolate(crop, (size, size), mode=mode, antialias=True)[0].clamp(0, 1)
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=1e-5)


def test_windows_have_the_areas_and_aspects_asked_for() -> None:
    keys = fold_in(torch.tensor(6), torch.arange(4000))
    windows = draw_windows((200, 200), keys, (0.1, 0.5), (0.5, 2.0))
    top, left, height, width = windows.unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 200).all()
    assert (left + width <= 200).all()
    area, aspect = (height * width / 200**2).double(), (width / height).double()
    assert area.min() > 0.098
    assert area.max() < 0.51
    assert aspect.min() > 0.49
    assert aspect.max() < 2.05
    assert kstest(aspect.log().numpy(), uniform_distribution(-math.log(2), 2 * math.log(2)).cdf).pvalue > 1e-3
    assert kstest(area.numpy(), uniform_distribution(0.1, 0.4).cdf).pvalue > 1e-3
    assert len(set(zip(top.tolist(), left.tolist()))) > 3000


def test_a_window_that_never_fits_is_central_and_of_an_allowed_aspect() -> None:
    keys = fold_in(torch.tensor(7), torch.arange(5))
    assert draw_windows((10, 100), keys, (0.9, 1.0), (3 / 4, 4 / 3)).tolist() == [[0, 43, 10, 13]] * 5
    assert draw_windows((100, 9), keys, (0.9, 1.0), (3 / 4, 4 / 3)).tolist() == [[44, 0, 12, 9]] * 5
