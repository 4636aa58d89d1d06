"""The `backbone` section: the timm model and its weights. The `method` section: which parameters are trained.

Methods that change or re-parameterise the frozen layers have their sections in `reparameterized.py`.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from fedpeft_dist.config.paths import UserPath
from fedpeft_dist.config.schema.added_modules import (
    AdaptformerConfig,
    ConvpassConfig,
    DiffitConfig,
    HoulsbyConfig,
    PrefixConfig,
    RepadapterConfig,
)
from fedpeft_dist.config.schema.reparameterized import (
    DoraConfig,
    FactTkConfig,
    FactTtConfig,
    Ia3Config,
    LoraConfig,
    SsfConfig,
    VeraConfig,
)
from fedpeft_dist.config.schema.types import Blocks, Channels, Count, Fraction, MethodSection, Section


class BackboneConfig(Section):
    name: str = "vit_base_patch16_224.augreg_in21k"
    """A timm model's name, with its pre-training tag, or `glyph_vit`, the small model that the package carries."""
    pretrained: bool = True
    """Start from timm's weights, which `fedpeft prefetch` downloads beforehand, or the package's for `glyph_vit`."""
    checkpoint: UserPath | None = None
    """A local file whose weights replace timm's: .safetensors, .pth, .pth.tar, .pt, .bin, .npz, or the .index.json of
    several .safetensors or .bin files. The weights may be wrapped as public pre-trainings wrap them. They must fill the
    whole model except its classifier, and hold no more of an encoder than the model has."""
    model_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments for `timm.create_model`, passed unchanged."""
    mean: Channels | None = None
    """Mean of each channel, for images scaled to 0 .. 1; null: timm's for `name`. A checkpoint may need another."""
    std: Channels | None = None
    """Standard deviation of each channel. Goes with `mean`."""

    def problems(self) -> dict[str, bool]:
        mean, std = self.mean and list(self.mean), self.std and list(self.std)
        return {
            f"mean: {mean} without std; give both, or neither": bool(mean and not std),
            f"std: {std} without mean; give both, or neither": bool(std and not mean),
            f"std: {std} holds 0; give values above 0 and up to 1": 0.0 in (std or ()),
        }


class FullConfig(MethodSection):
    """Full fine-tuning: every parameter."""

    name: Literal["full"]


class HeadConfig(MethodSection):
    """The classifier alone. All other methods train it too."""

    name: Literal["head"]


class BiasConfig(MethodSection):
    """Every bias (BitFit, Zaken et al. 2022, arXiv 2106.10199)."""

    name: Literal["bias"]
    blocks: Blocks | None = None
    """Which blocks are trained: the last k, or a list of indices; null: the whole model. What comes after the last
    block, such as the final norm, belongs to the last block."""


class NormConfig(MethodSection):
    """The scale and bias of every normalisation layer."""

    name: Literal["norm"]
    blocks: Blocks | None = None
    """Which blocks are trained: the last k, or a list of indices; null: the whole model. What comes after the last
    block, such as the final norm, belongs to the last block."""


class PromptConfig(MethodSection):
    """Learned tokens beside the image's own (VPT, Jia et al. 2022, arXiv 2203.12119)."""

    name: Literal["prompt"]
    depth: Literal["shallow", "deep"] = "deep"
    """shallow: tokens for the first block, which travel through all blocks; deep: new tokens for every block."""
    tokens: Count = 10
    """The number of tokens for a block."""
    dropout: Fraction = 0.1
    blocks: Blocks | None = None
    """Which blocks get tokens: the last k, or a list of indices; null: all. Shallow tokens enter the first of them and
    leave after the last, so these blocks must follow each other."""


class AdapterConfig(MethodSection):
    """Small residual modules on the output of each block's MLP (Houlsby et al. 2019, arXiv 1902.00751)."""

    name: Literal["adapter"]
    bottleneck: Count = 96
    """The adapter's inner width."""
    shared: bool = True
    """true: one module for all blocks, as in the paper; false: one module for each block."""
    blocks: Blocks | None = None
    """Which blocks are adapted: the last k, or a list of indices; null: all."""


class PartialConfig(MethodSection):
    """The last blocks and the final norm in full."""

    name: Literal["partial"]
    blocks: Blocks = 1
    """Which blocks are trained: the last k, or a list of indices. The final norm belongs to the last block."""


MethodConfig = Annotated[
    FullConfig
    | HeadConfig
    | BiasConfig
    | NormConfig
    | PromptConfig
    | AdapterConfig
    | LoraConfig
    | PartialConfig
    | AdaptformerConfig
    | HoulsbyConfig
    | RepadapterConfig
    | DiffitConfig
    | ConvpassConfig
    | PrefixConfig
    | SsfConfig
    | Ia3Config
    | DoraConfig
    | VeraConfig
    | FactTtConfig
    | FactTkConfig,
    Field(discriminator="name"),
]
