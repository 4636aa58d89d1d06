"""Resizing and augmentation on the device: a pure function of the images and of each sample's key.

Shapes: R rows, C channels, H x W pixels as stored, S the side of the backbone's input.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch.nn import functional as F

from fedpeft_dist.config.schema import DataConfig
from fedpeft_dist.lanes.random import fold_in, uniform

_FLIP, _CROP_Y, _CROP_X, _AREA, _RATIO = range(5)
WINDOW_TRIES = 10
_RATIO_STEPS = 1024


Transform = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Turns images [R, C, H, W] in 0 .. 1 into the backbone's input [R, C, S, S], before normalisation.

The keys are int64 [R]. None means no augmentation: the images are only resized.
"""


def make_transform(config: DataConfig, interpolation: str) -> Transform:
    """The transform that the config's `image_size` and `augment` name.

    Args:
        interpolation: "bilinear" or "bicubic", used if the config says "auto".
    """
    mode, size = choose_interpolation(config, interpolation), config.image_size

    def transform(images: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        augment = "none" if keys is None else config.augment
        if augment == "resized_crop_flip":
            windows = draw_windows(images.shape[-2:], keys, config.crop_scale, config.crop_ratio)
            images = resize_windows(images, windows, size, mode)
        else:
            images = resize(images, size, mode)
        if augment == "crop_flip":
            images = random_crop(images, keys, config.crop_padding)
        return images if augment == "none" else random_flip(images, keys)

    return transform


def choose_interpolation(config: DataConfig, backbone: str) -> str:
    """The config's interpolation or, for "auto", the backbone's."""
    return backbone if config.interpolation == "auto" else config.interpolation


def resize(images: torch.Tensor, size: int, mode: str) -> torch.Tensor:
    """Resizes [R, C, H, W] in 0 .. 1 to squares, antialiased. Values that bicubic puts outside 0 .. 1 are clamped."""
    if images.shape[-2:] == (size, size):
        return images
    resized = F.interpolate(images, (size, size), mode=mode, antialias=True)
    return resized.clamp_(0, 1) if mode == "bicubic" else resized


def random_flip(images: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Mirrors each image [R, C, H, W] left to right with probability 1/2."""
    flip = uniform(fold_in(keys, _FLIP)) < 0.5
    return torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)


def random_crop(images: torch.Tensor, keys: torch.Tensor, padding: int) -> torch.Tensor:
    """Shifts each image [R, C, H, W] by up to `padding` pixels each way. Pixels from outside are black."""
    padded = F.pad(images, (padding,) * 4)
    rows, _, height, width = images.shape
    top, left = _draw_corner(keys, 2 * padding + 1, 2 * padding + 1)
    y = top.view(-1, 1, 1) + torch.arange(height, device=images.device).view(1, -1, 1)
    x = left.view(-1, 1, 1) + torch.arange(width, device=images.device).view(1, 1, -1)
    sample = torch.arange(rows, device=images.device).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[sample, y, x].permute(0, 3, 1, 2)


def _draw_corner(
    keys: torch.Tensor, rows: torch.Tensor | int, columns: torch.Tensor | int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One of so many rows and one of so many columns for each key: int64 [R] each."""
    return (uniform(fold_in(keys, _CROP_Y)) * rows).long(), (uniform(fold_in(keys, _CROP_X)) * columns).long()


def draw_windows(
    shape: tuple[int, int], keys: torch.Tensor, scale: tuple[float, float], ratio: tuple[float, float]
) -> torch.Tensor:
    """A window of random area and aspect inside each image (Inception's crop, Szegedy et al. 2015, arXiv 1409.4842).

    The first of WINDOW_TRIES draws that fits is taken. If none fits, it is the largest central window with an aspect in
    the range.

    Args:
        shape: (H, W).
        keys: int64 [R].
        scale: the range of the window's area as a share of the image's area, drawn uniformly.
        ratio: the range of the window's width over its height, drawn uniformly in the logarithm.

    Returns:
        int64 [R, 4]: top, left, height, width.
    """
    height, width = shape
    tries = fold_in(keys.unsqueeze(1), torch.arange(WINDOW_TRIES, device=keys.device))  # [R, tries]
    areas = (scale[0] + (scale[1] - scale[0]) * uniform(fold_in(tries, _AREA))) * (height * width)
    table, central = _window_tables(shape, ratio, keys.device)
    aspects = table[(uniform(fold_in(tries, _RATIO)) * _RATIO_STEPS).long()]
    widths, heights = (areas * aspects).sqrt().round().long(), (areas / aspects).sqrt().round().long()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    own_height, own_width = heights.gather(1, first).squeeze(1), widths.gather(1, first).squeeze(1)
    top, left = _draw_corner(keys, height - own_height + 1, width - own_width + 1)
    drawn = torch.stack([top, left, own_height, own_width], dim=1)
    return torch.where(fits.any(dim=1, keepdim=True), drawn, central)


@lru_cache(maxsize=8)
def _window_tables(
    shape: tuple[int, int], ratio: tuple[float, float], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The aspects to draw from, float32 [_RATIO_STEPS], and the largest central window, int64 [4]; copied there once.

    Aspects come from a table. The kernel of exp may round differently in its vectorised body and in its tail, so a
    window would depend on the sample's place in the batch. A square root is exact everywhere.
    """
    height, width = shape
    aspects = torch.logspace(math.log(ratio[0]), math.log(ratio[1]), _RATIO_STEPS, base=math.e, dtype=torch.float64)
    whole_height, whole_width = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    central = [(height - whole_height) // 2, (width - whole_width) // 2, whole_height, whole_width]
    return aspects.float().to(device), torch.tensor(central, device=device)


def resize_windows(images: torch.Tensor, windows: torch.Tensor, size: int, mode: str) -> torch.Tensor:
    """Crops a window out of each image and resizes it with antialiasing, as `resize` would: [R, C, S, S].

    The windows' sizes differ between samples, so each axis is resampled by a batched matrix product.

    Args:
        images: [R, C, H, W].
        windows: int64 [R, 4], top, left, height, width, as `draw_windows` gives them.
    """
    rows, channels, height, width = images.shape
    top, left, own_height, own_width = windows.unbind(1)
    down = _resampling(top, own_height, height, size, mode)  # [R, S, H]
    across = _resampling(left, own_width, width, size, mode)  # [R, S, W]
    # The channels lie beside the pixels, not in the batch: one product a sample is rounded the same in any batch.
    resized = torch.bmm(down, images.transpose(1, 2).reshape(rows, height, channels * width))
    resized = torch.bmm(resized.view(rows, size * channels, width), across.mT)
    resized = resized.view(rows, size, channels, size).transpose(1, 2)
    return resized.clamp_(0, 1) if mode == "bicubic" else resized


def _resampling(start: torch.Tensor, length: torch.Tensor, full: int, size: int, mode: str) -> torch.Tensor:
    """The matrices that resample `length` pixels, beginning at `start`, to `size` pixels: [R, size, full].

    The filter is as wide as the reduction asks for. Weights outside the window are dropped, and the rest sum to 1.
    """
    step = length.float().view(-1, 1, 1) / size
    spread = step.clamp(min=1.0)
    centre = step * (torch.arange(size, device=start.device).view(1, -1, 1) + 0.5)
    pixel = torch.arange(full, device=start.device).view(1, 1, -1) - start.view(-1, 1, 1)
    weights = _FILTERS[mode](((pixel + 0.5 - centre) / spread).abs())
    weights = torch.where((pixel >= 0) & (pixel < length.view(-1, 1, 1)), weights, 0.0)
    return weights / weights.sum(dim=-1, keepdim=True)


def _cubic(x: torch.Tensor) -> torch.Tensor:
    """The cubic convolution of Keys (1981) with a = -1/2."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


_FILTERS = {"bilinear": lambda x: (1 - x).clamp(min=0), "bicubic": _cubic}
