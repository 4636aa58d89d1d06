"""The `method` sections of the methods that add modules to a backbone's blocks."""

from typing import Literal

from fedpeft_dist.config.schema.types import Blocks, Count, MethodSection, Positive


class AdaptformerConfig(MethodSection):
    """A scaled bottleneck beside each block's MLP (AdaptFormer, Chen et al. 2022, arXiv 2205.13535)."""

    name: Literal["adaptformer"]
    bottleneck: Count = 64
    """The inner width."""
    scale: Positive = 0.1
    """The factor of the bottleneck's output."""
    blocks: Blocks | None = None
    """Which blocks are adapted: the last k, or a list of indices; null: all."""


class HoulsbyConfig(MethodSection):
    """Two adapters a block, after the attention and after the MLP (Houlsby et al. 2019, arXiv 1902.00751)."""

    name: Literal["houlsby"]
    bottleneck: Count = 64
    """The adapters' inner width."""
    blocks: Blocks | None = None
    """Which blocks are adapted: the last k, or a list of indices; null: all."""


class RepadapterConfig(MethodSection):
    """A linear adapter in front of attention and MLP, which merges (RepAdapter, Luo et al. 2023, arXiv 2302.08106)."""

    name: Literal["repadapter"]
    bottleneck: Count = 8
    """The adapters' inner width."""
    groups: Count = 2
    """The groups of the up-projection. They divide the bottleneck and the backbone's width."""
    scale: Positive = 1.0
    """The factor of an adapter's output."""
    blocks: Blocks | None = None
    """Which blocks are adapted: the last k, or a list of indices; null: all."""

    def problems(self) -> dict[str, bool]:
        told = f"groups: {self.groups} does not divide bottleneck: {self.bottleneck}; give one of its divisors"
        return {told: self.bottleneck % self.groups != 0}


class DiffitConfig(MethodSection):
    """Every bias and norm, and a scale for each residual branch (DiffFit, Xie et al. 2023, arXiv 2304.06648)."""

    name: Literal["diffit"]
    blocks: Blocks | None = None
    """Which blocks are trained: the last k, or a list of indices; null: the whole model. What comes after the last
    block, such as the final norm, belongs to the last block."""


class ConvpassConfig(MethodSection):
    """A convolutional bypass beside attention and MLP (Convpass, Jie & Deng 2022, arXiv 2207.07039)."""

    name: Literal["convpass"]
    bottleneck: Count = 8
    """The channels of the convolution."""
    scale: Positive = 1.0
    """The factor of a bypass's output."""
    blocks: Blocks | None = None
    """Which blocks are adapted: the last k, or a list of indices; null: all."""


class PrefixConfig(MethodSection):
    """Learned keys and values in each block's attention (prefix tuning, Li & Liang 2021, arXiv 2101.00190)."""

    name: Literal["prefix"]
    tokens: Count = 10
    """The number of keys, and of values, for a block."""
    blocks: Blocks | None = None
    """Which blocks get keys and values: the last k, or a list of indices; null: all."""
