"""The `backbone` section: which timm model, and with which weights."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from fedpeft_dist.config.paths import UserPath
from fedpeft_dist.config.schema.types import Channels, Section


class BackboneConfig(Section):
    name: str = "vit_base_patch16_224.augreg_in21k"
    """Any timm model, with its pre-training tag, or `glyph_vit`, the small one that the package carries."""
    pretrained: bool = True
    """Take timm's own weights, which must be on this machine (`fedpeft prefetch` downloads them), or the package's."""
    checkpoint: UserPath | None = None
    """A local file to take the weights from instead: .safetensors, .pth, .pth.tar, .pt, .bin, .npz, or the
    .index.json of several .safetensors or .bin files.

    It may be wrapped as public pre-trainings wrap it. It must fill all of the model but a classifier, and may hold no
    more of an encoder than the model has."""
    model_args: dict[str, Any] = Field(default_factory=dict)
    """Passed to `timm.create_model` as they are."""
    mean: Channels | None = None
    """Per channel, for images scaled to 0 .. 1; null takes what timm has for `name`. A checkpoint may want others."""
    std: Channels | None = None
    """The same, given together with `mean`."""

    @model_validator(mode="after")
    def _mean_and_std_go_together(self) -> BackboneConfig:
        if (self.mean is None) != (self.std is None):
            given, absent = ("std", "mean") if self.mean is None else ("mean", "std")
            raise ValueError(f"{given}: {list(getattr(self, given))} without {absent}; give both, or neither")
        if self.std is not None and 0.0 in self.std:
            raise ValueError(f"std: {list(self.std)} holds 0; give values above 0 and up to 1")
        return self
