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
        groups = [[block] for block in model.blocks] if config.depth == "deep" else [list(model.blocks)]
        patch = math.prod(model.patch_embed.patch_size)
        bound = math.sqrt(6 / (backbone.channels * patch + model.embed_dim))
        device = next(model.parameters()).device
        prompted = []
        for index, group in enumerate(groups):
            initial = torch.empty(config.tokens, model.embed_dim, device=device).uniform_(-bound, bound)
            blocks, name = nn.Sequential(*group), f"blocks.{index}.prompt"
            prompted.append(PromptedBlocks(blocks, name, initial, model.num_prefix_tokens, config.dropout))
        model.blocks = nn.Sequential(*prompted)
        return train_head(backbone)
