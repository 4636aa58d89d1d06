"""Norm-tuning: scale and bias of every normalisation layer, and the head."""

import torch
from torch import nn

from fedpeft_dist.backbones.timm_backbone import Backbone
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.lanes.ops import lane_affine
from fedpeft_dist.methods.bias import NORM_CHANNEL_DIM
from fedpeft_dist.methods.head import train_head
from fedpeft_dist.methods.lane_model import FoldedLaneModel, LaneModule, replace_module
from fedpeft_dist.methods.method import InPlaceMethod


class LaneNorm(LaneModule):
    """A normalisation with each lane's own scale and bias."""

    def __init__(self, name: str, layer: nn.Module):
        super().__init__()
        self.declare("scale", f"{name}.weight", layer.weight)
        self.declare("bias", f"{name}.bias", layer.bias)
        self.channel_dim = NORM_CHANNEL_DIM[type(layer)]
        layer.weight = layer.bias = None
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return lane_affine(self.layer(x), self.scale, self.bias, self.channel_dim)


class Norm(InPlaceMethod):
    def build(self, backbone: Backbone) -> FoldedLaneModel:
        model = backbone.model
        for name, layer in model.named_modules():
            kind = type(layer)
            if "norm" in kind.__name__.lower() and kind not in NORM_CHANNEL_DIM and hasattr(layer, "weight"):
                raise ConfigError(
                    f"method.name: 'norm' does not fit {type(model).__name__}: {name} is a {kind.__name__}"
                )
        norms = [(name, m) for name, m in model.named_modules() if type(m) in NORM_CHANNEL_DIM]
        norms = [(name, m) for name, m in norms if m.weight is not None and m.bias is not None]
        if not norms:
            known = ", ".join(kind.__name__ for kind in (nn.LayerNorm, nn.BatchNorm2d, nn.GroupNorm))
            raise ConfigError(f"method.name: 'norm' finds no {known} with scale and bias in {type(model).__name__}")
        for name, layer in norms:
            replace_module(model, name, LaneNorm(name, layer))
        train_head(backbone)
        return FoldedLaneModel(backbone)
