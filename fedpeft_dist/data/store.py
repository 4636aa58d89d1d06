"""Serves a split's batches on the device, by sample number: gather, resize and augment, normalise.

On the CPU, images stay where they are, usually in a memory map, and rows are copied out. A GPU gets all images at once
if they fit. Otherwise a background thread gathers the next batch on the host while the GPU computes.

Shapes: S samples, L lanes, B batch, R rows of a batch, C channels, H x W pixels.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.data.augment import Transform
from fedpeft_dist.data.datasets import ImageSet
from fedpeft_dist.runtime.memory import free_device_memory

UPLOAD_ROWS = 4096
DEVICE_SHARE = 0.5
"""The share of the device's free memory for the images of all splits. The rest is for training."""


class DeviceStore:
    """Batches of a split. Nothing is decoded here, and a batch does not depend on where the images are kept.

    Args:
        transform: resizes images to the backbone's size and, if keys are given, augments them.
        channels: the backbone's channels. Grey images are repeated to fill them.
        mean, std: the backbone's own, per channel, for images scaled to 0 .. 1.
        resident: whether all images are moved to the device now. False moves them batch by batch.

    Raises:
        ConfigError: the images are in colour and the backbone takes grey ones.
    """

    def __init__(
        self,
        images: ImageSet,
        transform: Transform,
        channels: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        resident: bool = True,
    ):
        own = images.images.shape[1]
        if own not in (1, channels):
            raise ConfigError(
                f"data: images of {own} channels for a backbone of {channels}; "
                f"give backbone.model_args: {{in_chans: {own}}}"
            )
        self.streamed = None if resident else StreamedRows(images, device)
        self.images = images
        if resident and device.type != "cpu":
            self.images = ImageSet(upload(images, device), images.labels)
        self.labels = images.labels.to(device)
        self.device, self.transform, self.channels = device, transform, channels
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=device).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def expect(self, samples: Sequence[torch.Tensor]) -> None:
        """Announces the samples of a round, int64 [n] each. Only a FeatureStore needs to know."""

    def forget(self) -> None:
        """Drops what has been computed for samples: nothing. Only a FeatureStore computes anything."""

    def prefetch(self, indices: torch.Tensor) -> None:
        """Announces the indices, int64 [L, B] on the host, of the next call of `batch`."""
        if self.streamed is not None:
            self.streamed.prefetch(indices.flatten())

    def batch(self, indices: torch.Tensor, keys: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised images and their labels, on the device.

        Args:
            indices: int64 [L, B], on the host.
            keys: int64 [L, B] on the device, one per sample, for augmentation; None augments nothing.

        Returns:
            float32 [L, B, C, H, W] and int64 [L, B].
        """
        if self.streamed is None:
            images = self.images.images.index_select(0, send(self.images.places(indices.flatten()), self.device))
        else:
            images = self.streamed.gather(indices.flatten())
        images = self.transform(images.float().div_(255), None if keys is None else keys.flatten())
        images = (images - self.mean) / self.std  # grey images become channels here, by broadcasting
        return images.view(*indices.shape, *images.shape[1:]), self.labels[send(indices, self.device)]


class HostRows(Protocol):
    """A tensor on the host with a row for each sample, such as an ImageSet."""

    images: torch.Tensor
    """[S, ...]."""

    def places(self, samples: torch.Tensor) -> torch.Tensor:
        """The rows of samples: int64 [n] for int64 [n]."""


class StreamedRows:
    """Images, or features, that stay on the host.

    Each batch is gathered into a page-locked buffer and copied from there. PyTorch keeps such buffers for
    later batches, and gives none of them out while it is still being copied.
    """

    def __init__(self, images: HostRows, device: torch.device):
        self.images, self.device = images, device
        self.on_cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.on_cuda else None
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self.pending: tuple[torch.Tensor, Future[tuple[torch.Tensor, torch.cuda.Event | None]]] | None = None

    def gather(self, indices: torch.Tensor) -> torch.Tensor:
        """The rows of these samples (int64 [R], on the host): [R, ...] on the device."""
        if self.pending is None or not torch.equal(self.pending[0], indices):
            self.prefetch(indices)  # runs after an unwanted one
        (_, brought), self.pending = self.pending, None
        pixels, ready = brought.result()
        if ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(ready)
            pixels.record_stream(current)  # allocated on the other stream, which must not reuse it too early
        return pixels

    def prefetch(self, indices: torch.Tensor) -> None:
        """Announces the samples of the next call of `gather`."""
        self.pending = indices, self.worker.submit(self._bring, indices)

    def _bring(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Returns the images on the device and the event that tells their arrival. Runs in the background thread."""
        images, places = self.images.images, self.images.places(indices)
        buffer = torch.empty((len(places), *images.shape[1:]), dtype=images.dtype, pin_memory=self.on_cuda)
        torch.index_select(images, 0, places, out=buffer)
        if not self.on_cuda:
            return buffer, None
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            pixels, ready = buffer.to(self.device, non_blocking=True), torch.cuda.Event()
            ready.record(self.stream)
        return pixels, ready


def choose_resident(splits: list[ImageSet], device: torch.device, sharers: int = 1) -> list[bool]:
    """Tells for each split whether it is kept on the device: the first ones that fit into DEVICE_SHARE together.

    `sharers` is the number of processes that share the device.
    """
    if device.type == "cpu":
        return [True] * len(splits)
    budget, chosen = DEVICE_SHARE * free_device_memory(device, sharers), []
    for split in splits:
        size = len(split) * split.images[0].nbytes
        chosen.append(size <= budget)
        budget -= size if size <= budget else 0
    return chosen


def upload(images: ImageSet, device: torch.device) -> torch.Tensor:
    """Copies all samples to the device, piece by piece: uint8 [S, C, H, W]. The host need not hold all of them."""
    there = torch.empty((len(images), *images.images.shape[1:]), dtype=torch.uint8, device=device)
    for piece in torch.arange(len(images)).split(UPLOAD_ROWS):
        there[piece[0] : piece[-1] + 1] = images.images[images.places(piece)].to(device)
    return there


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor to the device. The host does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
