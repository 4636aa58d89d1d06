"""The `method` section: which parameters are trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedpeft_dist.config.schema.types import Count, Fraction, Positive, Section


class FullConfig(Section):
    name: Literal["full"]


class HeadConfig(Section):
    name: Literal["head"]


class BiasConfig(Section):
    name: Literal["bias"]


class NormConfig(Section):
    name: Literal["norm"]


class PromptConfig(Section):
    name: Literal["prompt"]
    depth: Literal["shallow", "deep"] = "deep"
    tokens: Count = 10
    dropout: Fraction = 0.1


class AdapterConfig(Section):
    name: Literal["adapter"]
    bottleneck: Count = 96
    shared: bool = True
    """One module for all blocks (the paper's), or one per block."""


class LoraConfig(Section):
    name: Literal["lora"]
    rank: Count = 8
    alpha: Positive = 16.0
    """The update is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    targets: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = Field(("qkv",), strict=False, min_length=1)
    """Linear layers of a block: qkv and proj are the attention's, fc1 and fc2 the MLP's."""


MethodConfig = Annotated[
    FullConfig | HeadConfig | BiasConfig | NormConfig | PromptConfig | AdapterConfig | LoraConfig,
    Field(discriminator="name"),
]
