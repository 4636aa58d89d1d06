"""Augmentation on the device, a pure function of each sample's key.

Shapes: R rows, C channels, H x W pixels.
"""

from __future__ import annotations

from functools import partial

import torch

from fedpeft_dist.config.schema import DataConfig
from fedpeft_dist.data.store import Augmentation
from fedpeft_dist.lanes.random import fold_in, uniform

_FLIP, _CROP_Y, _CROP_X = range(3)


def make_augmentation(config: DataConfig) -> Augmentation | None:
    """What the config's `augment` names, as a function of (images, keys)."""
    if config.augment == "none":
        return None
    if config.augment == "flip":
        return random_flip
    return partial(_crop_then_flip, padding=config.crop_padding)


def random_flip(images: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Mirrors each image [R, C, H, W] left to right with probability 1/2."""
    flip = uniform(fold_in(keys, _FLIP)) < 0.5
    return torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)


def random_crop(images: torch.Tensor, keys: torch.Tensor, padding: int) -> torch.Tensor:
    """Shifts each image [R, C, H, W] by up to `padding` pixels each way; what comes in from outside is black."""
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    rows, _, height, width = images.shape
    span = 2 * padding + 1
    top = (uniform(fold_in(keys, _CROP_Y)) * span).long()
    left = (uniform(fold_in(keys, _CROP_X)) * span).long()
    y = top.view(-1, 1, 1) + torch.arange(height, device=images.device).view(1, -1, 1)
    x = left.view(-1, 1, 1) + torch.arange(width, device=images.device).view(1, 1, -1)
    sample = torch.arange(rows, device=images.device).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[sample, y, x].permute(0, 3, 1, 2)


def _crop_then_flip(images: torch.Tensor, keys: torch.Tensor, padding: int) -> torch.Tensor:
    return random_flip(random_crop(images, keys, padding), keys)
