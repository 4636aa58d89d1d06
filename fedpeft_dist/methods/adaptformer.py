"""AdaptFormer (Chen et al. 2022, arXiv 2205.13535, section 3.2): a scaled bottleneck beside each MLP, and the head.

    n = norm(x);  x + mlp(n) + scale * up(relu(down(n)))

The up-projection and both biases start at zero, so round 0 is the backbone. A block has 2DH + H + D parameters, L
blocks L (2DH + H + D), for width D and bottleneck H: 1,189,632 on ViT-B/16 at H = 64.

The paper's code differs in three ways. It feeds the bottleneck x in place of norm(x). It drops 10 % of the hidden
values. It adds the bottleneck's output behind the block's drop-path; here that output shares drop-path and layer scale
with the MLP's.
"""

import math

import torch
from torch import nn

from fedpeft_dist.backbones.deferred import device_of
from fedpeft_dist.backbones.timm_backbone import Backbone
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import AdaptformerConfig
from fedpeft_dist.methods.blocks import MIXERS, Scope, find_mlps
from fedpeft_dist.methods.bottleneck import LaneBottleneck, ParallelLayer
from fedpeft_dist.methods.in_place import train_head
from fedpeft_dist.methods.lane_model import FoldedLaneModel
from fedpeft_dist.methods.method import Method


class Adaptformer(Method):
    config: AdaptformerConfig

    def build(self, backbone: Backbone) -> FoldedLaneModel:
        model, config = backbone.model, self.config
        mlps = find_mlps(model, Scope(model, config.blocks))
        if not mlps:
            mixers, kind = " or ".join(MIXERS), type(model).__name__
            raise ConfigError(f"method.name: 'adaptformer' finds no blocks with an mlp beside {mixers} in {kind}")
        for name, mlp in mlps.items():
            down = nn.Linear(mlp.fc2.out_features, config.bottleneck, device=device_of(mlp.fc2.weight))
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
            nn.init.zeros_(down.bias)
            own = LaneBottleneck(f"{name}.adapter", down, torch.relu, config.scale)
            model.set_submodule(name, ParallelLayer(mlp, own))
        return train_head(backbone)
