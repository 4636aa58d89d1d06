"""Serves a split's batches on the device, by sample number: gather, resize and augment, normalise.

Shapes: L lanes, B batch, C channels, H x W pixels.
"""

import torch

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.data.augment import Transform
from fedpeft_dist.data.datasets import ImageSet
from fedpeft_dist.data.pixels import Pixels, ResidentPixels, StreamedPixels, send


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
        self.pixels: Pixels = ResidentPixels(images, device) if resident else StreamedPixels(images, device)
        self.labels = images.labels.to(device)
        self.device, self.transform, self.channels = device, transform, channels
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=device).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def prefetch(self, indices: torch.Tensor) -> None:
        """Announces the indices, int64 [L, B] on the host, of the next call of `batch`."""
        self.pixels.prefetch(indices.flatten())

    def batch(self, indices: torch.Tensor, keys: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised images and their labels, on the device.

        Args:
            indices: int64 [L, B], on the host.
            keys: int64 [L, B] on the device, one per sample, for augmentation; None augments nothing.

        Returns:
            float32 [L, B, C, H, W] and int64 [L, B].
        """
        images = self.pixels.gather(indices.flatten()).float().div_(255)
        images = self.transform(images, None if keys is None else keys.flatten())
        images = (images - self.mean) / self.std  # grey images become channels here, by broadcasting
        return images.view(*indices.shape, *images.shape[1:]), self.labels[send(indices, self.device)]
