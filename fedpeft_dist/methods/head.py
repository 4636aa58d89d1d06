"""Head-tuning (linear probing): the classifier alone. Every other PEFT method trains it too, through `train_head`."""

import torch
from torch import nn

from fedpeft_dist.backbones.timm_backbone import Backbone, classifier_names
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.lanes.ops import lane_linear
from fedpeft_dist.methods.lane_model import FoldedLaneModel, LaneModule, replace_module
from fedpeft_dist.methods.method import InPlaceMethod


class LaneLinear(LaneModule):
    """A linear layer with each lane's own weight and bias; [R, ..., D] to [R, ..., E]."""

    def __init__(self, name: str, linear: nn.Linear):
        super().__init__()
        self.declare("weight", f"{name}.weight", linear.weight)
        self.bias = None
        if linear.bias is not None:
            self.declare("bias", f"{name}.bias", linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return lane_linear(x, self.weight, self.bias)


class Head(InPlaceMethod):
    def build(self, backbone: Backbone) -> FoldedLaneModel:
        train_head(backbone)
        return FoldedLaneModel(backbone)


def train_head(backbone: Backbone) -> None:
    """Gives every lane its own classifier.

    Raises:
        ConfigError: the classifier is not a linear layer.
    """
    names = classifier_names(backbone.model)
    if not names:
        raise ConfigError(f"backbone.name: {type(backbone.model).__name__} names no classifier; use method full")
    for name in names:
        classifier = backbone.model.get_submodule(name)
        if not isinstance(classifier, nn.Linear):
            kind = type(classifier).__name__
            raise ConfigError(
                f"backbone.name: the classifier {name!r} is a {kind}, not a linear layer; use method full"
            )
        replace_module(backbone.model, name, LaneLinear(name, classifier))
