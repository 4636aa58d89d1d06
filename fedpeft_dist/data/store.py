"""A split of a data set on the device, served in batches by index: gather, resize, augment, normalise.

Shapes: L lanes, B batch, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.data.datasets import ImageSet

Augmentation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class DeviceStore:
    """uint8 images that live on the device; nothing is decoded or copied from the host during a round.

    Args:
        channels: what the backbone takes; grey images are repeated to fill it.
        mean, std: the backbone's own, per channel, for images scaled to 0 .. 1.
        augmentation: maps (images [R, C, H, W] in 0 .. 1, keys int64 [R]) to images; used where keys are given.

    Raises:
        ConfigError: colour images for a backbone that takes grey ones.
    """

    def __init__(
        self,
        images: ImageSet,
        image_size: int,
        channels: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        augmentation: Augmentation | None = None,
    ):
        own = images.images.shape[1]
        if own not in (1, channels):
            raise ConfigError(
                f"data: images of {own} channels for a backbone of {channels}; "
                f"give backbone.model_args: {{in_chans: {own}}}"
            )
        self.images = images.images.to(device)
        self.labels = images.labels.to(device)
        self.image_size, self.channels, self.augmentation = image_size, channels, augmentation
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=device).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: torch.Tensor, keys: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised images and their labels.

        Args:
            indices: int64 [L, B].
            keys: int64 [L, B], one per sample, for augmentation; None serves the images as they are.

        Returns:
            float32 [L, B, C, H, W] and int64 [L, B].
        """
        flat = indices.flatten()
        images = self.images[flat].float().div_(255)
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
        if self.augmentation is not None and keys is not None:
            images = self.augmentation(images, keys.flatten())
        images = (images - self.mean) / self.std  # grey images become channels here, by broadcasting
        return images.view(*indices.shape, self.channels, *size), self.labels[indices]
