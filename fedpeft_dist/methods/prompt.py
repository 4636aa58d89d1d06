"""Visual prompt tuning (VPT, Jia et al. 2022, arXiv 2203.12119): learned tokens beside the image's own, and the head.

Deep: every block gets its own tokens, and its outputs at their places are thrown away. Shallow: the first block gets
tokens, and they travel through all blocks. In both cases they are removed before the final norm and the pooling.

Shapes: R rows, T tokens, D width.
"""

import math

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fedpeft_dist.backbones.timm_backbone import Backbone
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import PromptConfig
from fedpeft_dist.lanes.dropout import make_dropout
from fedpeft_dist.lanes.ops import lane_tokens
from fedpeft_dist.methods.blocks import ATTRIBUTE, choose_blocks
from fedpeft_dist.methods.in_place import train_head
from fedpeft_dist.methods.lane_model import FoldedLaneModel, LaneModule
from fedpeft_dist.methods.method import Method


class PromptedBlocks(LaneModule):
    """Consecutive blocks with learned tokens after the prefix (class) tokens; [R, T, D] to [R, T, D]."""

    def __init__(self, blocks: nn.Sequential, name: str, initial: torch.Tensor, prefix: int, dropout: float):
        super().__init__()
        self.declare("tokens", name, initial, cast=False)
        self.blocks, self.prefix = blocks, prefix
        self.dropout = make_dropout(dropout, name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.dropout(lane_tokens(self.tokens, x.shape[0]).to(x.dtype))
        x = torch.cat([x[:, : self.prefix], tokens, x[:, self.prefix :]], dim=1)
        x = self.blocks(x)
        return torch.cat([x[:, : self.prefix], x[:, self.prefix + tokens.shape[1] :]], dim=1)


class Prompt(Method):
    config: PromptConfig

    def build(self, backbone: Backbone) -> FoldedLaneModel:
        model, config = backbone.model, self.config
        if not isinstance(model, VisionTransformer):
            kind = type(model).__name__
            raise ConfigError(f"method.name: 'prompt' fits plain ViTs (timm's VisionTransformer), not {kind}")
        patch = math.prod(model.patch_embed.patch_size)
        bound = math.sqrt(6 / (backbone.channels * patch + model.embed_dim))
        device = next(model.parameters()).device
        blocks = list(model.blocks)
        for index, stop in self._groups(model):
            initial = torch.empty(config.tokens, model.embed_dim, device=device).uniform_(-bound, bound)
            own, name = nn.Sequential(*model.blocks[index:stop]), f"{ATTRIBUTE}.{index}.prompt"
            blocks[index] = PromptedBlocks(own, name, initial, model.num_prefix_tokens, config.dropout)
            blocks[index + 1 : stop] = [None] * (stop - index - 1)
        model.blocks = nn.Sequential(*(block for block in blocks if block is not None))
        return train_head(backbone)

    def _groups(self, model: VisionTransformer) -> list[tuple[int, int]]:
        """The first block of each group that shares tokens, and the one after its last.

        Raises:
            ConfigError: the model has no such blocks, or shallow tokens would skip one.
        """
        given = self.config.blocks
        chosen = list(range(len(model.blocks))) if given is None else choose_blocks(model, given)
        if self.config.depth == "deep":
            return [(index, index + 1) for index in chosen]
        if chosen[-1] - chosen[0] >= len(chosen):
            raise ConfigError(
                f"method.blocks: {list(given)} skips a block, and shallow tokens cannot; give depth: deep"
            )
        return [(chosen[0], chosen[-1] + 1)]
