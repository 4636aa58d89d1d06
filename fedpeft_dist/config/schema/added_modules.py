"""The `method` sections of the methods that add modules to a backbone's blocks."""

from typing import Literal

from fedpeft_dist.config.schema.types import Blocks, Count, Positive, Section


class AdaptformerConfig(Section):
    """A scaled bottleneck beside each block's MLP (AdaptFormer, Chen et al. 2022, arXiv 2205.13535)."""

    name: Literal["adaptformer"]
    bottleneck: Count = 64
    """The inner width."""
    scale: Positive = 0.1
    """The factor of the bottleneck's output."""
    blocks: Blocks | None = None
    """Which blocks are adapted: the last k, or a list of indices; null: all."""


class HoulsbyConfig(Section):
    """Two adapters a block, after the attention and after the MLP (Houlsby et al. 2019, arXiv 1902.00751)."""

    name: Literal["houlsby"]
    bottleneck: Count = 64
    """The adapters' inner width."""
    blocks: Blocks | None = None
    """Which blocks are adapted: the last k, or a list of indices; null: all."""
