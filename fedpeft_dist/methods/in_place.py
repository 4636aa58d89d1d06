"""The methods that train the backbone's own tensors, under timm's names, and the classifier of every other method.

    full  every parameter; without pre-training it is the paper's "scratch"
    head  the classifier alone (linear probing), which every other PEFT method trains, too
    bias  every parameter called `bias`, and the head (BitFit, Zaken et al. 2022, arXiv 2106.10199)
    norm  scale and bias of every normalisation layer, and the head

`blocks` restricts bias and norm to some blocks. Partial fine-tuning has a file of its own.

A layer that ends with the addition of its bias becomes the layer without a bias, followed by each lane's own addition.
The large product stays one product over all lanes.
"""

import re
from typing import Any

import torch
from timm.layers import LayerNorm, LayerNorm2d
from torch import nn

from fedpeft_dist.backbones.timm_backbone import Backbone, classifier_names
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.lanes.onednn import MIN_WIDTH, FrozenLinear, lane_product
from fedpeft_dist.lanes.ops import lane_affine, lane_bias, lane_linear
from fedpeft_dist.methods.blocks import Scope
from fedpeft_dist.methods.lane_model import FoldedLaneModel, LaneModule, VmapLaneModel
from fedpeft_dist.methods.method import Method, Tensors

# The dimension of the channels in a norm layer's output. Only exact types: a subclass may do more after the addition.
NORM_CHANNEL_DIM = {nn.LayerNorm: -1, LayerNorm: -1, LayerNorm2d: 1, nn.BatchNorm2d: 1, nn.GroupNorm: 1}
CHANNEL_DIM = {nn.Linear: -1, nn.Conv2d: 1, **NORM_CHANNEL_DIM}
PEFT_NORM = "ln_tuning_layers"  # peft's name for its copy of a layer, in the layer's place


class LaneLinear(LaneModule):
    """A linear layer with each lane's own weight and bias; [R, ..., D] to [R, ..., E]."""

    def __init__(self, name: str, linear: nn.Linear):
        super().__init__()
        self.bias, self.use_onednn = None, False
        for attribute, initial in linear.named_parameters():
            self.declare(attribute, f"{name}.{attribute}", initial)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // x.shape[-1] // len(self.weight)
        if self.use_onednn and min(rows, *self.weight.shape[1:]) >= MIN_WIDTH:
            return lane_product(x, self.weight, self.bias)
        return lane_linear(x, self.weight, self.bias)


class LaneNorm(LaneModule):
    """A normalisation with each lane's own scale and bias."""

    def __init__(self, name: str, layer: nn.Module):
        super().__init__()
        self.declare("scale", f"{name}.weight", layer.weight, cast=False)
        self.declare("bias", f"{name}.bias", layer.bias, cast=False)
        layer.weight = layer.bias = None
        self.layer, self.channel_dim = layer, CHANNEL_DIM[type(layer)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return lane_affine(self.layer(x), self.scale, self.bias, self.channel_dim)


class LayerOnLanes(LaneModule):
    """A frozen layer with something of each lane's own after it."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        """Gives the model other attributes of the layer, such as a convolution's kernel size."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer":
                raise
            return getattr(self.layer, name)


class LaneBias(LayerOnLanes):
    """A frozen layer with each lane's own bias."""

    def __init__(self, name: str, layer: nn.Module):
        super().__init__(layer)
        self.declare("bias", f"{name}.bias", layer.bias, cast=type(layer) not in NORM_CHANNEL_DIM)
        layer.bias = None
        self.channel_dim = CHANNEL_DIM[type(layer)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.layer, FrozenLinear):
            return self.layer.with_lane_bias(x, self.bias)
        return lane_bias(self.layer(x), self.bias, self.channel_dim)


class InPlaceMethod(Method):
    """A method that trains tensors of the backbone itself, under timm's names."""

    merges_exactly = True

    def merge(self, backbone: Tensors, trained: Tensors) -> dict[str, torch.Tensor]:
        return {**backbone, **trained}


class Full(InPlaceMethod):
    def build(self, backbone: Backbone) -> VmapLaneModel:
        return VmapLaneModel(backbone)


class Head(InPlaceMethod):
    def build(self, backbone: Backbone) -> FoldedLaneModel:
        return train_head(backbone)


class Bias(InPlaceMethod):
    def build(self, backbone: Backbone) -> FoldedLaneModel:
        model = backbone.model
        if not train_biases(model, Scope(model, self.config.blocks), "bias"):
            raise ConfigError(f"method.name: 'bias' finds no bias outside the head of {type(model).__name__}")
        return train_head(backbone)


class Norm(InPlaceMethod):
    def build(self, backbone: Backbone) -> FoldedLaneModel:
        model = backbone.model
        if not train_norms(model, Scope(model, self.config.blocks), "norm"):
            known, kind = "LayerNorm, BatchNorm2d, GroupNorm", type(model).__name__
            raise ConfigError(f"method.name: 'norm' finds no {known} with scale and bias in {kind}")
        return train_head(backbone)

    def to_peft(self, model: nn.Module, trained: Tensors) -> tuple[dict[str, Any], Tensors]:
        """peft copies each layer, so the statistics of batch norm go along."""
        tensors = {}
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LaneNorm)}
        for name, tensor in trained.items():
            layer, _, attribute = name.rpartition(".")
            tensors[f"{layer}.{PEFT_NORM}.{attribute}" if layer in layers else name] = tensor
        for name, layer in layers.items():
            tensors |= {f"{name}.{PEFT_NORM}.{key}": buffer for key, buffer in layer.layer.named_buffers()}
        # A list would match every module whose name ends so, and timm has several called `norm`.
        names = "|".join(re.escape(name) for name in layers)
        return {"peft_type": "LN_TUNING", "target_modules": names}, tensors


def train_biases(model: nn.Module, scope: Scope, method: str) -> bool:
    """Gives every lane its own bias of each layer in the scope but the classifiers; whether there is one.

    Raises:
        ConfigError: a layer does not end with the addition of its bias.
    """
    heads = classifier_names(model)
    layers = [(name, m) for name, m in model.named_modules() if name in scope and name not in heads]
    biased = [(name, m) for name, m in layers if getattr(m, "bias", None) is not None]
    for name, layer in biased:
        if type(layer) not in CHANNEL_DIM:
            raise ConfigError(_misfit(model, method, name, layer))
        model.set_submodule(name, LaneBias(name, layer))
    return bool(biased)


def train_norms(model: nn.Module, scope: Scope, method: str) -> bool:
    """Gives every lane its own scale and bias of each normalisation in the scope; whether there is one.

    Raises:
        ConfigError: a normalisation does more than normalise, scale and add.
    """
    layers = [(name, m) for name, m in model.named_modules() if name in scope]
    for name, layer in layers:
        is_norm = "norm" in type(layer).__name__.lower() and hasattr(layer, "weight")
        if is_norm and type(layer) not in NORM_CHANNEL_DIM:
            raise ConfigError(_misfit(model, method, name, layer))
    norms = [(name, m) for name, m in layers if type(m) in NORM_CHANNEL_DIM]
    norms = [(name, m) for name, m in norms if m.weight is not None and m.bias is not None]
    for name, layer in norms:
        model.set_submodule(name, LaneNorm(name, layer))
    return bool(norms)


def _misfit(model: nn.Module, method: str, name: str, layer: nn.Module) -> str:
    return f"method.name: {method!r} does not fit {type(model).__name__}: {name} is a {type(layer).__name__}"


def train_head(backbone: Backbone) -> FoldedLaneModel:
    """Gives every lane its own classifier, beside the modules that a method has put into the backbone.

    Raises:
        ConfigError: the classifier is not a linear layer.
    """
    names = classifier_names(backbone.model)
    if not names:
        raise ConfigError(f"backbone.name: {type(backbone.model).__name__} names no classifier; use method full")
    for name in names:
        classifier = backbone.model.get_submodule(name)
        if not isinstance(classifier, nn.Linear):
            told = f"the classifier {name!r} is a {type(classifier).__name__}, not a linear layer"
            raise ConfigError(f"backbone.name: {told}; use method full")
        backbone.model.set_submodule(name, LaneLinear(name, classifier))
    return FoldedLaneModel(backbone)
