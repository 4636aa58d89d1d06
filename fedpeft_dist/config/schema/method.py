"""The `method` section: which parameters are trained."""

from typing import Annotated, Literal

from pydantic import Field

from fedpeft_dist.config.schema.types import Count, Fraction, Positive, Section


class FullConfig(Section):
    """Full fine-tuning: every parameter."""

    name: Literal["full"]


class HeadConfig(Section):
    """The classifier alone. All other methods train it too."""

    name: Literal["head"]


class BiasConfig(Section):
    """Every bias (BitFit, Zaken et al. 2022, arXiv 2106.10199)."""

    name: Literal["bias"]


class NormConfig(Section):
    """The scale and bias of every normalisation layer."""

    name: Literal["norm"]


class PromptConfig(Section):
    """Learned tokens beside the image's own (VPT, Jia et al. 2022, arXiv 2203.12119)."""

    name: Literal["prompt"]
    depth: Literal["shallow", "deep"] = "deep"
    """shallow: tokens for the first block, which travel through all blocks; deep: new tokens for every block."""
    tokens: Count = 10
    """The number of tokens for a block."""
    dropout: Fraction = 0.1


class AdapterConfig(Section):
    """Small residual modules on the output of each block's MLP (Houlsby et al. 2019, arXiv 1902.00751)."""

    name: Literal["adapter"]
    bottleneck: Count = 96
    """The adapter's inner width."""
    shared: bool = True
    """true: one module for all blocks, as in the paper; false: one module for each block."""


class LoraConfig(Section):
    """Low-rank updates of linear layers (Hu et al. 2021, arXiv 2106.09685)."""

    name: Literal["lora"]
    rank: Count = 8
    alpha: Positive = 16.0
    """The update is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    targets: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = Field(("qkv",), strict=False, min_length=1)
    """Linear layers of a block: qkv and proj belong to the attention, fc1 and fc2 to the MLP."""


MethodConfig = Annotated[
    FullConfig | HeadConfig | BiasConfig | NormConfig | PromptConfig | AdapterConfig | LoraConfig,
    Field(discriminator="name"),
]
