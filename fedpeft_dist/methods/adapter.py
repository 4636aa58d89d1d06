"""Adapters (Houlsby et al. 2019, arXiv 1902.00751) on the output of each block's MLP, and the head.

    y = mlp(x);  y + up(gelu(down(y)))

The paper shares one adapter between all blocks. Only the up-projection starts at zero. The model therefore starts as
the backbone, and every matrix has a gradient from the second step on.
"""

from torch import nn

from fedpeft_dist.backbones.timm_backbone import Backbone
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import AdapterConfig
from fedpeft_dist.methods.blocks import MIXERS, Scope, find_mlps
from fedpeft_dist.methods.bottleneck import LaneBottleneck, SerialLayer
from fedpeft_dist.methods.in_place import train_head
from fedpeft_dist.methods.lane_model import FoldedLaneModel
from fedpeft_dist.methods.method import Method


class Adapter(Method):
    config: AdapterConfig

    def build(self, backbone: Backbone) -> FoldedLaneModel:
        model, config = backbone.model, self.config
        kind, mlps = type(model).__name__, find_mlps(model, Scope(model, config.blocks))
        if not mlps:
            mixers = " or ".join(MIXERS)
            raise ConfigError(f"method.name: 'adapter' finds no blocks with an mlp beside {mixers} in {kind}")
        widths = sorted({mlp.fc2.out_features for mlp in mlps.values()})
        if config.shared and len(widths) > 1:
            raise ConfigError(f"method.shared: true needs blocks of one width, {kind} has {widths}; give shared: false")
        device = next(model.parameters()).device

        def bottleneck(name: str, width: int) -> LaneBottleneck:
            return LaneBottleneck(name, nn.Linear(width, config.bottleneck, device=device), nn.functional.gelu)

        shared = bottleneck("adapter", widths[0]) if config.shared else None
        for name, mlp in mlps.items():
            own = shared or bottleneck(f"{name}.adapter", mlp.fc2.out_features)
            model.set_submodule(name, SerialLayer(mlp, own))
        return train_head(backbone)
