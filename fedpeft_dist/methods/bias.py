"""Bias-tuning (BitFit, Zaken et al. 2022, arXiv 2106.10199): every parameter called `bias`, and the head.

A layer that ends with the addition of its bias becomes the layer without a bias, followed by each lane's own addition.
The large product stays one product over all lanes.
"""

from typing import Any

import torch
from timm.layers import LayerNorm, LayerNorm2d
from torch import nn

from fedpeft_dist.backbones.timm_backbone import Backbone, classifier_names
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.lanes.ops import lane_bias
from fedpeft_dist.methods.head import train_head
from fedpeft_dist.methods.lane_model import FoldedLaneModel, LaneModule, replace_module
from fedpeft_dist.methods.method import InPlaceMethod

# The dimension of the channels in a norm layer's output. Only exact types: a subclass may do more after the addition.
NORM_CHANNEL_DIM = {
    nn.LayerNorm: -1,
    LayerNorm: -1,
    LayerNorm2d: 1,
    nn.BatchNorm2d: 1,
    nn.GroupNorm: 1,
}
CHANNEL_DIM = {nn.Linear: -1, nn.Conv2d: 1, **NORM_CHANNEL_DIM}


class LaneBias(LaneModule):
    """A frozen layer with each lane's own bias."""

    def __init__(self, name: str, layer: nn.Module):
        super().__init__()
        self.declare("bias", f"{name}.bias", layer.bias)
        self.channel_dim = CHANNEL_DIM[type(layer)]
        layer.bias = None
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        """Gives the model other attributes of the layer, such as a convolution's kernel size."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer":
                raise
            return getattr(self.layer, name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return lane_bias(self.layer(x), self.bias, self.channel_dim)


class Bias(InPlaceMethod):
    def build(self, backbone: Backbone) -> FoldedLaneModel:
        model = backbone.model
        biased = [(name, m) for name, m in model.named_modules() if getattr(m, "bias", None) is not None]
        biased = [(name, m) for name, m in biased if name not in classifier_names(model)]
        if not biased:
            raise ConfigError(f"method.name: 'bias' finds no bias outside the head of {type(model).__name__}")
        for name, layer in biased:
            if type(layer) not in CHANNEL_DIM:
                raise ConfigError(
                    f"method.name: 'bias' does not fit {type(model).__name__}: {name} is a {type(layer).__name__}"
                )
            replace_module(model, name, LaneBias(name, layer))
        train_head(backbone)
        return FoldedLaneModel(backbone)
