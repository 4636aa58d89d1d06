"""Batches from a store, resident or streamed, against torchvision and arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import transforms

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import SyntheticConfig
from fedpeft_dist.data.augment import make_transform
from fedpeft_dist.data.datasets import ImageSet
from fedpeft_dist.data.image_store import read_only_tensor
from fedpeft_dist.data.store import DeviceStore, StreamedRows, choose_resident, upload
from fedpeft_dist.lanes.random import fold_in

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")


def image_set(channels: int, side: int = 12, size: int = 10) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, channels, side, side), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(size) % 4)


def store_of(
    images: ImageSet, image_size: int, augment: str = "none", channels: int = 3, resident: bool = True
) -> DeviceStore:
    config = SyntheticConfig(name="synthetic", image_size=image_size, augment=augment, crop_padding=2)
    mean, std = (MEAN, STD) if channels == 3 else ((0.4,), (0.3,))
    return DeviceStore(images, make_transform(config, "bilinear"), channels, mean, std, CPU, resident)


def test_pixels_are_scaled_and_normalised_per_channel() -> None:
    images = image_set(3)
    indices = torch.tensor([[3, 0, 9], [9, 1, 3]])
    batch, labels = store_of(images, 12).batch(indices)
    assert batch.shape == (2, 3, 3, 12, 12)
    assert batch.dtype == torch.float32
    assert labels.tolist() == [[3, 0, 1], [1, 1, 3]]
    for lane, row in enumerate(indices.tolist()):
        for place, index in enumerate(row):
            pixels = images.images[index].numpy().astype(np.float64) / 255
            expected = (pixels - np.array(MEAN).reshape(3, 1, 1)) / np.array(STD).reshape(3, 1, 1)
            np.testing.assert_allclose(batch[lane, place].numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("image_size", [5, 12, 16, 30])
def test_resizing_and_normalising_are_torchvisions(image_size: int) -> None:
    images = image_set(3)
    transform = transforms.Compose(
        [
            transforms.ConvertImageDtype(torch.float32),
            transforms.Resize((image_size, image_size), antialias=True),
            transforms.Normalize(MEAN, STD),
        ]
    )
    batch, _ = store_of(images, image_size).batch(torch.arange(10).view(2, 5))
    expected = torch.stack([transform(image) for image in images.images])
    torch.testing.assert_close(batch.flatten(0, 1), expected, rtol=1e-5, atol=2e-6)


def test_images_that_are_no_squares_are_resized_too() -> None:
    images = ImageSet(torch.full((2, 3, 7, 10), 255, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    batch, _ = store_of(images, 8).batch(torch.tensor([[0, 1]]))
    white = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(batch, white.view(3, 1, 1).expand(1, 2, 3, 8, 8))


def test_grey_images_fill_every_channel_of_a_colour_backbone() -> None:
    grey = image_set(1)
    repeated = ImageSet(grey.images.expand(-1, 3, -1, -1).contiguous(), grey.labels)
    indices = torch.arange(10).view(5, 2)
    keys = fold_in(torch.tensor(4), indices)
    for image_size in (12, 20):
        for augment in ("none", "crop_flip", "resized_crop_flip"):
            found, _ = store_of(grey, image_size, augment).batch(indices, keys)
            expected, _ = store_of(repeated, image_size, augment).batch(indices, keys)
            assert found.shape == (5, 2, 3, image_size, image_size)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_grey_images_stay_grey_for_a_grey_backbone() -> None:
    images = image_set(1)
    batch, _ = store_of(images, 12, channels=1).batch(torch.tensor([[2]]))
    expected = (images.images[2].double() / 255 - 0.4) / 0.3
    np.testing.assert_allclose(batch[0, 0].numpy(), expected.numpy(), atol=2e-6)


@pytest.mark.parametrize(("own", "channels"), [(3, 1), (2, 3), (4, 3)])
def test_colour_images_for_another_backbone_are_refused(own: int, channels: int) -> None:
    with pytest.raises(ConfigError, match=rf"images of {own} channels .* backbone of {channels}.*in_chans: {own}"):
        store_of(image_set(own), 12, channels=channels)


@pytest.mark.parametrize("image_size", [9, 12, 17])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", ["crop_flip", "resized_crop_flip"])
def test_a_sample_is_the_same_to_the_bit_in_any_batch(channels: int, image_size: int, augment: str) -> None:
    store = store_of(image_set(channels), image_size, augment)
    indices = torch.tensor([[0, 7, 7, 2, 9], [4, 0, 1, 1, 3], [5, 6, 8, 2, 2]])
    keys = fold_in(torch.tensor(1), torch.arange(15).view(3, 5))
    batch, labels = store.batch(indices, keys)
    for lane in range(3):
        for place in range(5):
            own = (slice(lane, lane + 1), slice(place, place + 1))
            alone, label = store.batch(indices[own], keys[own])
            assert torch.equal(alone, batch[own])
            assert torch.equal(label, labels[own])


def test_keys_turn_augmentation_on_and_the_images_stay_as_they_are() -> None:
    images = image_set(3)
    before = images.images.clone()
    plain, augmented = store_of(images, 12), store_of(images, 12, "crop_flip")
    indices = torch.arange(10).view(1, 10)
    keys = fold_in(torch.tensor(1), indices)
    assert torch.equal(augmented.batch(indices)[0], plain.batch(indices)[0])
    assert torch.equal(plain.batch(indices, keys)[0], plain.batch(indices)[0])
    first, _ = augmented.batch(indices, keys)
    assert not torch.equal(first, plain.batch(indices)[0])
    assert torch.equal(augmented.batch(indices, keys)[0], first)
    assert torch.equal(images.images, before)
    assert len(augmented) == 10


def test_pixels_from_outside_a_crop_are_black_before_normalisation() -> None:
    white = ImageSet(torch.full((1, 3, 12, 12), 255, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    keys = torch.arange(40).view(1, 40)
    batch, _ = store_of(white, 12, "crop_flip").batch(torch.zeros(1, 40, dtype=torch.int64), keys)
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    bright = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    is_black = (batch[0] - black.view(3, 1, 1)).abs() < 1e-5
    is_bright = (batch[0] - bright.view(3, 1, 1)).abs() < 1e-5
    assert (is_black | is_bright).all()
    assert is_black.any()


def memory_mapped(images: ImageSet, path: Path) -> ImageSet:
    np.save(path, images.images.numpy())
    return replace(images, images=read_only_tensor(np.load(path, mmap_mode="r")))


@pytest.mark.parametrize("augment", ["none", "crop_flip", "resized_crop_flip"])
@pytest.mark.parametrize("subset", [False, True])
def test_wherever_images_are_kept_batches_are_the_same_to_the_bit(tmp_path: Path, augment: str, subset: bool) -> None:
    """In memory, in a map, streamed with and without announcing the next batch, picked by rows or copied."""
    images = image_set(3)
    rows = torch.tensor([8, 1, 5, 3, 2, 0])
    chosen = replace(images, labels=images.labels[rows], rows=rows) if subset else images
    copied = ImageSet(images.images[rows], images.labels[rows]) if subset else images
    mapped = memory_mapped(chosen, tmp_path / "images.npy")
    stores = [store_of(kept, 9, augment) for kept in (copied, chosen, mapped)]
    stores += [store_of(mapped, 9, augment, resident=False), store_of(mapped, 9, augment, resident=False)]
    announced = stores[-1]
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3), (2, 3), (2, 3), (1, 5), (2, 3), (4, 4), (1, 1)]
    batches = [torch.randint(0, len(copied), shape, generator=generator) for shape in shapes]
    for number, (indices, upcoming) in enumerate(zip(batches, [*batches[1:], batches[0]])):
        keys = None if number == 3 else fold_in(torch.tensor(number), torch.arange(indices.numel()).view(indices.shape))
        expected, labels = stores[0].batch(indices, keys)
        assert torch.equal(labels, copied.labels[indices])
        for store in stores[1:]:
            found, own = store.batch(indices, keys)
            if store is announced and number != 1:  # once, somebody else's batch is announced and never asked for
                store.prefetch(upcoming if number != 4 else batches[0])
            assert torch.equal(found, expected)
            assert torch.equal(own, labels)


def test_a_streamed_batch_does_not_change_while_others_are_loaded() -> None:
    """Memory is used again and again; a batch that was handed out is not touched."""
    images = image_set(3, size=60)
    pixels = StreamedRows(images, CPU)
    parts = torch.arange(60).split(10)
    found = []
    for part, upcoming in zip(parts, [*parts[1:], parts[0]]):
        found.append(pixels.gather(part))
        pixels.prefetch(upcoming)
    assert torch.equal(torch.cat(found), images.images)


def test_announced_batches_are_gathered_in_the_background() -> None:
    images = image_set(3)
    pixels = StreamedRows(images, CPU)
    indices = torch.tensor([4, 2])
    pixels.prefetch(indices)
    announced = pixels.pending[1]
    announced.result()
    assert torch.equal(pixels.gather(indices), images.images[indices])
    assert pixels.pending is None
    pixels.prefetch(torch.tensor([1]))
    assert torch.equal(pixels.gather(indices), images.images[indices])


def test_an_error_in_the_background_is_raised_where_the_batch_is_asked_for() -> None:
    pixels = StreamedRows(image_set(3), CPU)
    pixels.prefetch(torch.tensor([1000]))
    with pytest.raises(IndexError):
        pixels.gather(torch.tensor([1000]))
    assert len(pixels.gather(torch.tensor([1]))) == 1


def test_splits_that_fit_on_the_device_are_kept_there_training_images_first(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, large, small = torch.device("cuda"), image_set(3, size=100), image_set(3, size=10)
    size = large.images.nbytes
    subset = replace(large, labels=large.labels[:10], rows=torch.arange(10))
    for free, splits, expected in (
        (3 * size, [large, small], [True, True]),
        (2 * size, [large, small], [True, False]),
        (size, [large, small], [False, True]),
        (size, [subset, small], [True, True]),
        (0, [large, small], [False, False]),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert choose_resident(splits, gpu) == expected
    assert choose_resident([large, small], CPU) == [True, True]


def test_uploading_goes_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpeft_dist.data.store.UPLOAD_ROWS", 4)
    images, rows = image_set(3), torch.tensor([9, 0, 4, 4, 2])
    assert torch.equal(upload(images, CPU), images.images)
    subset = replace(images, labels=images.labels[rows], rows=rows)
    assert torch.equal(upload(subset, CPU), images.images[rows])
