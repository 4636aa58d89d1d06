"""The steps from a picture to the backbone's input. A run writes them beside its parameters; an export tells them.

timm describes such steps by the arguments of `timm.data.create_transform`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import ImageOps
from PIL.Image import Image

from fedpeft_dist.config.schema import DataConfig
from fedpeft_dist.data.augment import choose_interpolation

if TYPE_CHECKING:
    from torchvision.transforms import Compose

SQUASH, CENTER = "squash", "center"
"""timm's names for images resized whole, and for images resized on the shorter side and cropped."""


@dataclass(frozen=True)
class ImageRecipe:
    """The steps from a picture to the backbone's input, without augmentation."""

    size: int
    channels: int
    interpolation: str
    crop_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    upright: bool
    """Whether a picture is turned by its EXIF orientation first. timm leaves this to its caller."""

    @classmethod
    def of(
        cls, config: DataConfig, interpolation: str, mean: tuple[float, ...], std: tuple[float, ...], cropped: bool
    ) -> "ImageRecipe":
        """
        Args:
            interpolation, mean, std: the backbone's own.
            cropped: whether the stored images were cropped.
        """
        mode, interpolation = CENTER if cropped else SQUASH, choose_interpolation(config, interpolation)
        return cls(config.image_size, len(mean), interpolation, mode, mean, std, config.upright)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "ImageRecipe | None":
        """None if the run is of an older version, which wrote no recipe."""
        if "crop_mode" not in metadata:
            return None
        size, mean, std, upright = (json.loads(metadata[key]) for key in ("image_size", "mean", "std", "upright"))
        return cls(size, len(mean), metadata["interpolation"], metadata["crop_mode"], tuple(mean), tuple(std), upright)

    def metadata(self) -> dict[str, str]:
        """The recipe as text, for a safetensors file."""
        told = {"image_size": self.size, "interpolation": self.interpolation, "crop_mode": self.crop_mode}
        told |= {"mean": self.mean, "std": self.std, "upright": self.upright}
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in told.items()}

    def timm_arguments(self) -> dict[str, Any]:
        """The arguments of `timm.data.create_transform`."""
        size, fit = (self.channels, self.size, self.size), {"crop_pct": 1.0, "crop_mode": self.crop_mode}
        return {"input_size": size, "interpolation": self.interpolation, **fit, "mean": self.mean, "std": self.std}

    def transform(self) -> "Compose":
        """From a PIL picture of any size to the backbone's input, float32 [C, H, W]."""
        from timm.data import create_transform  # it takes a second
        from torchvision.transforms import Compose

        return Compose([self._ready, *create_transform(**self.timm_arguments()).transforms])

    def _ready(self, picture: Image) -> Image:
        """A picture upright, if the run has turned pictures, and in the backbone's channels."""
        picture = ImageOps.exif_transpose(picture) if self.upright else picture
        return picture.convert({1: "L", 3: "RGB"}.get(self.channels, picture.mode))

    def describe(self) -> str:
        """The recipe in sentences, for a README."""
        side, stored = f"{self.size} x {self.size}", ""
        turned = "turned by their EXIF orientation, " if self.upright else ""
        fitted = f"resized whole to {side} ({self.interpolation})"
        if self.crop_mode == CENTER:
            fitted = f"resized on the shorter side to {self.size} ({self.interpolation}), cropped to the central {side}"
            stored = " The run cropped first and resized then, so its pixels differ by rounding."
        channels = f"in {self.channels} channels, with mean {list(self.mean)} and std {list(self.std)}"
        return f"Images are {turned}{fitted}, scaled to 0 .. 1 and normalised, {channels}.{stored}"
