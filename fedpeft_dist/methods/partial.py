"""Partial fine-tuning: the last blocks and the final norm in full, and the head. Merges into plain timm weights.

The blocks are built from layers with each lane's own tensors, so that the frozen blocks before them stay shared by all
lanes, and vmap is not needed.
"""

import torch
from timm.models.vision_transformer import LayerScale
from torch import nn

from fedpeft_dist.backbones.timm_backbone import Backbone, classifier_names
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import PartialConfig
from fedpeft_dist.lanes.ops import lane_scale
from fedpeft_dist.methods.blocks import Scope
from fedpeft_dist.methods.in_place import NORM_CHANNEL_DIM, InPlaceMethod, LaneLinear, LaneNorm, train_head
from fedpeft_dist.methods.lane_model import FoldedLaneModel, LaneModule


class LaneLayerScale(LaneModule):
    """A layer scale with each lane's own gamma; [R, ..., D] to [R, ..., D]."""

    def __init__(self, name: str, layer: nn.Module):
        super().__init__()
        self.declare("gamma", f"{name}.gamma", layer.gamma)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return lane_scale(x, self.gamma)


class Partial(InPlaceMethod):
    config: PartialConfig

    def build(self, backbone: Backbone) -> FoldedLaneModel:
        model, heads = backbone.model, classifier_names(backbone.model)
        scope = Scope(model, self.config.blocks)
        for name, layer in list(model.named_modules()):
            if name in scope and name not in heads and next(layer.parameters(recurse=False), None) is not None:
                model.set_submodule(name, _lane_layer(name, layer, type(model).__name__))
        return train_head(backbone)


def _lane_layer(name: str, layer: nn.Module, kind: str) -> LaneModule:
    """
    Raises:
        ConfigError: lanes cannot have tensors of their own in such a layer.
    """
    if type(layer) is nn.Linear:
        return LaneLinear(name, layer)
    if type(layer) in NORM_CHANNEL_DIM and layer.bias is not None:
        return LaneNorm(name, layer)
    if type(layer) is LayerScale:
        return LaneLayerScale(name, layer)
    raise ConfigError(f"method.name: 'partial' does not fit {kind}: {name} is a {type(layer).__name__}")
