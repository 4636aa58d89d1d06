"""The `backbone` section: the timm model and its weights."""

from typing import Any

from pydantic import Field, model_validator

from fedpeft_dist.config.paths import UserPath
from fedpeft_dist.config.schema.types import Channels, Section


class BackboneConfig(Section):
    name: str = "vit_base_patch16_224.augreg_in21k"
    """A timm model's name, with its pre-training tag, or `glyph_vit`, the small model that the package carries."""
    pretrained: bool = True
    """Start from timm's weights, which `fedpeft prefetch` downloads beforehand, or the package's for `glyph_vit`."""
    checkpoint: UserPath | None = None
    """A local file whose weights replace timm's: .safetensors, .pth, .pth.tar, .pt, .bin, .npz, or the .index.json of
    several .safetensors or .bin files.

    The weights may be wrapped as public pre-trainings wrap them. They must fill the whole model except its classifier,
    and hold no more of an encoder than the model has."""
    model_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments for `timm.create_model`, passed unchanged."""
    mean: Channels | None = None
    """Mean of each channel, for images scaled to 0 .. 1; null: timm's for `name`. A checkpoint may need another."""
    std: Channels | None = None
    """Standard deviation of each channel. Goes with `mean`."""

    @model_validator(mode="after")
    def _mean_and_std_go_together(self) -> "BackboneConfig":
        if (self.mean is None) != (self.std is None):
            given, absent = ("std", "mean") if self.mean is None else ("mean", "std")
            raise ValueError(f"{given}: {list(getattr(self, given))} without {absent}; give both, or neither")
        if self.std is not None and 0.0 in self.std:
            raise ValueError(f"std: {list(self.std)} holds 0; give values above 0 and up to 1")
        return self
