"""Adapters as Houlsby et al. 2019 place them (arXiv 1902.00751, section 2.1), two a block, and the head.

    y = attention(x) or mlp(x);  y + up(gelu(down(y))), then the residual connection

An adapter has 2DH + H + D parameters, L blocks 2L (2DH + H + D), for width D and bottleneck H: 2,379,264 on ViT-B/16
at H = 64. The method `adapter` is the smaller variant: an adapter on the MLP alone, or one for all blocks.

The paper draws all weights from a normal distribution with standard deviation 0.01, truncated at two deviations. Here
the up-projection starts at zero, so that round 0 is the backbone. The paper also trains the norm layers; here they stay
frozen.
"""

from torch import nn

from fedpeft_dist.backbones.timm_backbone import Backbone
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import HoulsbyConfig
from fedpeft_dist.methods.blocks import ATTENTIONS, Scope, find_branches
from fedpeft_dist.methods.bottleneck import LaneBottleneck, SerialLayer
from fedpeft_dist.methods.in_place import train_head
from fedpeft_dist.methods.lane_model import FoldedLaneModel
from fedpeft_dist.methods.method import Method

DEVIATION = 0.01
"""Standard deviation of the initial down-projection."""


class Houlsby(Method):
    config: HoulsbyConfig

    def build(self, backbone: Backbone) -> FoldedLaneModel:
        model, scope = backbone.model, Scope(backbone.model, self.config.blocks)
        branches, device = find_branches(model, scope), next(model.parameters()).device
        if not branches:
            parts, kind = f"an attention ({' or '.join(ATTENTIONS)}) and an mlp", type(model).__name__
            raise ConfigError(f"method.name: 'houlsby' needs {parts} in every block, {kind} has other blocks")
        for name, width in branches.items():
            down = nn.Linear(width, self.config.bottleneck, device=device)
            nn.init.trunc_normal_(down.weight, std=DEVIATION, a=-2 * DEVIATION, b=2 * DEVIATION)
            nn.init.zeros_(down.bias)
            own = LaneBottleneck(f"{name}.adapter", down, nn.functional.gelu)
            model.set_submodule(name, SerialLayer(model.get_submodule(name), own))
        return train_head(backbone)
