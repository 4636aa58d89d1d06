"""Random distortions of clean drawings, so that a letter from a font looks like one from a pen and a scanner.

Letters are bent, thickened or thinned, and read back at as little as 8 x 8 pixels. Ink is bright, paper is dark.

Shapes: N images, S the side of a square image, R reading resolutions.
"""

from functools import cache

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

CHUNK = 2048
"""Images distorted at a time. This bounds memory, and it is part of what a seed means."""
READINGS: tuple[tuple[int, float, float], ...] = (
    *((8, 0.0, 0.3), (8, 1.0, 0.15), (9, 0.5, 0.05), (10, 0.5, 0.1), (12, 0.5, 0.1)),
    *((16, 0.5, 0.1), (16, 1.0, 0.05), (32, 0.5, 0.1), (32, 1.5, 0.05)),
)
"""The ways to read a distorted image: (pixels a side, blur in output pixels, share of the images). A coarse scanner's
8 x 8 pixels are the most frequent."""


def distort(drawings: Tensor, image_size: int, generator: Generator, strength: float = 1.0) -> Tensor:
    """One random version of each clean drawing [N, 1, S, S] uint8, N at least 1.

    The steps are: stroke width; rotation, shear, scale and shift with an elastic bend; a blur and a reading at a lower
    resolution with sensor noise (READINGS); contrast.

    Args:
        generator: the only source of randomness.
        strength: scales stroke, geometry and noise. At 0, only reading and contrast are left.

    Returns:
        float32 [N, 1, image_size, image_size] in 0 .. 1.
    """
    return torch.cat([_Distortion(len(c), generator, strength)(c, image_size) for c in drawings.split(CHUNK)])


class _Distortion:
    """The distortion of N drawings at once."""

    def __init__(self, count: int, generator: Generator, strength: float):
        self.count, self.generator, self.strength = count, generator, strength

    def __call__(self, drawings: Tensor, image_size: int) -> Tensor:
        image = self._change_strokes(drawings.float() / 255)
        image = self._read(self._bend(image, image_size), image_size)
        brightest = image.amax((1, 2, 3), keepdim=True).clamp(min=0.1)
        return (image / brightest * self._uniform(0.7, 1.5)).clamp(0, 1) ** self._uniform(0.6, 1.4)

    def _change_strokes(self, image: Tensor) -> Tensor:
        # The pixels by which each side of a stroke grows or, below 0, thins.
        width = self._uniform(-0.6, 1.6) * self.strength
        thick, thin = _thicken(image), 1 - _thicken(1 - image)
        image = torch.lerp(image, thick, width.clamp(0, 1))
        image = torch.lerp(image, _thicken(thick), (width - 1).clamp(0, 1))
        return torch.lerp(image, thin, (-width).clamp(0, 1))

    def _bend(self, image: Tensor, side: int) -> Tensor:
        """Rotates, shears, scales, shifts and bends: [N, S, S]."""
        angle, shear = self._normal() * 0.17, self._normal() * 0.2
        zoom_x = torch.exp(self._normal() * 0.2 - 0.1 * self.strength)
        zoom_y = torch.exp(self._normal() * 0.08 + 0.02 * self.strength)
        cos, sin = angle.cos(), angle.sin()
        across = torch.stack([cos, -sin + shear], -1) / zoom_x[:, None] * 0.85
        along = torch.stack([sin, cos], -1) / zoom_y[:, None] * 0.85
        affine = torch.cat([torch.stack([across, along], 1), self._normal(2, 1) * 0.07], dim=-1)  # [N, 2, 3]
        grid = F.affine_grid(affine, [self.count, 1, side, side], align_corners=False)
        bend = F.interpolate(self._normal(2, 4, 4) * 0.09, size=side, mode="bicubic", align_corners=True)
        return F.grid_sample(image, grid + bend.permute(0, 2, 3, 1), align_corners=False)[:, 0]

    def _read(self, image: Tensor, side: int) -> Tensor:
        """Reads at a lower resolution, with noise, and enlarges again: [N, 1, S, S]."""
        odds = torch.tensor([share for _, _, share in READINGS])
        entry = torch.multinomial(odds, self.count, replacement=True, generator=self.generator)
        down, up = (matrices[entry] for matrices in _reading_matrices(side))
        image = down @ image @ down.mT
        image = image + self._normal(side, side) * self._uniform(0.0, 0.08)[:, 0]
        return (up @ image.clamp(0, 1) @ up.mT)[:, None]

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(self.count, *shape, generator=self.generator) * self.strength

    def _uniform(self, low: float, high: float) -> Tensor:
        return torch.rand(self.count, 1, 1, 1, generator=self.generator) * (high - low) + low


def blur(side: int, sigma: float) -> Tensor:
    """The [side, side] matrix that blurs a column of pixels. Paper (0) lies beyond the edge."""
    if sigma == 0:
        return torch.eye(side)
    offsets = torch.arange(side)[:, None] - torch.arange(side)
    reach = torch.arange(-side, side + 1)
    return torch.exp(-0.5 * (offsets / sigma) ** 2) / torch.exp(-0.5 * (reach / sigma) ** 2).sum()


@cache
def _reading_matrices(side: int) -> tuple[Tensor, Tensor]:
    """The matrices that blur and average a column down, and those that interpolate it back: 2 x [R, S, S], by READINGS.

    Rows and columns beyond a resolution are zero, so that all resolutions fit one batched product.
    """
    down, up = torch.zeros(2, len(READINGS), side, side)
    for entry, (wanted, sigma, _) in enumerate(READINGS):
        pixels = min(wanted, side)
        average = F.adaptive_avg_pool1d(torch.eye(side)[None], pixels)[0].T  # [pixels, S]
        down[entry, :pixels] = average @ blur(side, sigma)
        widen = F.interpolate(torch.eye(pixels)[None], size=side, mode="linear", align_corners=False)[0].T
        up[entry, :, :pixels] = widen  # [S, pixels]
    return down, up


def _thicken(image: Tensor) -> Tensor:
    """The largest value of a pixel and its four neighbours. Strokes gain a pixel on each side."""
    across = F.max_pool2d(image, (1, 3), stride=1, padding=(0, 1))
    return torch.maximum(across, F.max_pool2d(image, (3, 1), stride=1, padding=(1, 0)))
