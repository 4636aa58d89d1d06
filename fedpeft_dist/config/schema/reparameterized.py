"""The `method` section of the methods that change or re-parameterise the frozen layers. All of them merge."""

import math
from typing import Annotated, Literal

from pydantic import Field

from fedpeft_dist.config.schema.types import Blocks, Count, Fraction, MethodSection, Positive

Layer = Literal["qkv", "proj", "fc1", "fc2"]
"""A linear layer of a block: qkv and proj belong to the attention, fc1 and fc2 to the MLP."""
Target = Literal["qkv", "q", "k", "v", "proj", "fc1", "fc2"]
"""The same, or the queries', keys' or values' part of qkv."""


class LoraConfig(MethodSection):
    """Low-rank updates of linear layers (Hu et al. 2021, arXiv 2106.09685)."""

    name: Literal["lora"]
    rank: Count = 8
    alpha: Positive = 16.0
    """The update is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732)."""
    dropout: Fraction = 0.0
    targets: Annotated[tuple[Target, ...], Field(strict=False, min_length=1)] = ("qkv",)
    """Linear layers of a block: qkv and proj belong to the attention, fc1 and fc2 to the MLP. q, k and v are the parts
    of qkv, each with matrices of its own."""
    ranks: dict[Target, Count] = Field(default_factory=dict)
    """The ranks of single targets, in place of `rank`: {q: 4, fc1: 16}."""
    blocks: Blocks | None = None
    """Which blocks are adapted: the last k, or a list of indices; null: all."""

    def problems(self) -> dict[str, bool]:
        parts = [target for target in self.targets if target in ("q", "k", "v")]
        others = [target for target in self.ranks if target not in self.targets]
        return {
            f"targets: 'qkv' holds {', '.join(parts)} already; give either": bool(parts) and "qkv" in self.targets,
            f"ranks: {', '.join(others)} not among targets; give a rank to {', '.join(self.targets)}": bool(others),
        }

    def rank_of(self, target: str) -> int:
        return self.ranks.get(target, self.rank)

    def scale_of(self, target: str) -> float:
        """The factor of a target's update."""
        rank = self.rank_of(target)
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)


class SsfConfig(MethodSection):
    """A scale and a shift after every layer (SSF, Lian et al. 2022, arXiv 2210.08823)."""

    name: Literal["ssf"]
    blocks: Blocks | None = None
    """Which blocks are trained: the last k, or a list of indices; null: the whole model. What comes after the last
    block, such as the final norm, belongs to the last block."""


class Ia3Config(MethodSection):
    """A scale for keys, values and the MLP's inner activations ((IA)^3, Liu et al. 2022, arXiv 2205.05638)."""

    name: Literal["ia3"]
    targets: Annotated[tuple[Literal["k", "v", "fc2"], ...], Field(strict=False, min_length=1)] = ("k", "v", "fc2")
    """What is scaled: the keys, the values, and the input of the MLP's second layer."""
    blocks: Blocks | None = None
    """Which blocks are trained: the last k, or a list of indices; null: all."""


class DoraConfig(LoraConfig):
    """LoRA, with a magnitude for each output (DoRA, Liu et al. 2024, arXiv 2402.09353)."""

    name: Literal["dora"]
    targets: Annotated[tuple[Layer, ...], Field(strict=False, min_length=1)] = ("qkv",)


class VeraConfig(MethodSection):
    """Scales of a frozen random low-rank path that all layers share (VeRA, Kopiczko et al. 2023, arXiv 2310.11454)."""

    name: Literal["vera"]
    rank: Count = 256
    initial: Positive = 0.1
    """The scale of the inner `rank` values before the first round."""
    dropout: Fraction = 0.0
    projection_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """The frozen matrices follow from this number, so nothing sends or stores them."""
    targets: Annotated[tuple[Layer, ...], Field(strict=False, min_length=1)] = ("qkv", "proj", "fc1", "fc2")
    """Linear layers of a block."""
    blocks: Blocks | None = None
    """Which blocks are adapted: the last k, or a list of indices; null: all."""


class FactSection(MethodSection):
    rank: Count
    scale: Positive = 1.0
    """The factor of all updates."""
    dropout: Fraction = 0.0
    targets: Annotated[tuple[Layer, ...], Field(strict=False, min_length=1)] = ("qkv", "proj", "fc1", "fc2")
    """Linear layers of a block."""
    blocks: Blocks | None = None
    """Which blocks are adapted: the last k, or a list of indices; null: all."""


class FactTtConfig(FactSection):
    """One factorised tensor for all updates, as a tensor train (FacT, Jie and Deng 2023, arXiv 2212.03145)."""

    name: Literal["fact_tt"]
    rank: Count = 16


class FactTkConfig(FactSection):
    """The same, in Tucker's form."""

    name: Literal["fact_tk"]
    rank: Count = 32
