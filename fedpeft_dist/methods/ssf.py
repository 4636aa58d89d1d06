"""SSF (Lian et al. 2022, arXiv 2210.08823): a scale and a shift after each linear, convolution and norm layer.

    y = gamma * layer(x) + beta                                                                       (section 3.2)

gamma starts at 1 and beta at 0, so round 0 is the backbone. The paper's code draws them around these values, with a
standard deviation of 0.02. A layer without a bias gets gamma alone, because plain timm has no place for beta: EVA's
qkv, Swin's reductions. The head is trained in full. Layers whose result all samples share stay frozen.

Parameters: 2 for each output of a layer with a bias, else 1. A ViT of L blocks and width D, whose MLP has the ratio 4:
2 D (11 L + 2). ViT-B/16: 205,824.

Shapes: R rows, T tokens, C channels, H x W pixels.
"""

import torch
from torch import nn

from fedpeft_dist.backbones.deferred import device_of
from fedpeft_dist.backbones.timm_backbone import Backbone, classifier_names
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import SsfConfig
from fedpeft_dist.lanes.ops import lane_affine, lane_scale
from fedpeft_dist.methods.blocks import Scope
from fedpeft_dist.methods.in_place import CHANNEL_DIM, NORM_CHANNEL_DIM, LayerOnLanes, train_head
from fedpeft_dist.methods.lane_model import FoldedLaneModel
from fedpeft_dist.methods.method import Method, Tensors
from fedpeft_dist.methods.targets import replace_layer

SCALE, SHIFT = ".ssf_scale", ".ssf_shift"
"""The endings of the trained tensors' names, after the name of the layer."""


class LaneSsf(LayerOnLanes):
    """A frozen layer with each lane's own scale and shift; [R, T, C] or [R, C, H, W] as the layer gives it."""

    def __init__(self, name: str, layer: nn.Module):
        super().__init__(layer)
        one, cast = torch.ones(len(layer.weight), device=device_of(layer.weight)), type(layer) not in NORM_CHANNEL_DIM
        self.declare("scale", name + SCALE, one, cast)
        self.shift, self.channel_dim = None, CHANNEL_DIM[type(layer)]
        if layer.bias is not None:
            self.declare("shift", name + SHIFT, torch.zeros_like(one), cast)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        if self.shift is None:
            return lane_scale(y, self.scale, self.channel_dim)
        return lane_affine(y, self.scale, self.shift, self.channel_dim)


class Ssf(Method):
    config: SsfConfig

    def build(self, backbone: Backbone) -> FoldedLaneModel:
        model, kind = backbone.model, type(backbone.model).__name__
        scope, heads = Scope(model, self.config.blocks), classifier_names(model)
        layers = {name: m for name, m in model.named_modules() if name in scope and name not in heads}
        layers = {name: m for name, m in layers.items() if _is_scaled(m) and m not in backbone.shared_layers}
        for name, layer in layers.items():
            if type(layer) not in CHANNEL_DIM:
                raise ConfigError(f"method.name: 'ssf' does not fit {kind}: {name} is a {type(layer).__name__}")
            replace_layer(model, name, LaneSsf(name, layer))
        return train_head(backbone)

    def merge(self, backbone: Tensors, trained: Tensors) -> dict[str, torch.Tensor]:
        """Scales each output's weights and bias, and adds the shift to the bias, in float64."""
        merged = dict(backbone)
        for name, tensor in trained.items():
            if name.endswith(SCALE):
                layer, scale = name.removesuffix(SCALE), tensor.double()
                weight, bias = backbone[f"{layer}.weight"], backbone.get(f"{layer}.bias")
                by_output = scale.view(-1, *[1] * (weight.dim() - 1))
                merged[f"{layer}.weight"] = (weight.double() * by_output).to(weight.dtype)
                if bias is not None:
                    own = bias.double() * scale + trained[layer + SHIFT].double()
                    merged[f"{layer}.bias"] = own.to(bias.dtype)
            elif not name.endswith(SHIFT):
                merged[name] = tensor
        return merged


def _is_scaled(module: nn.Module) -> bool:
    """Whether a module is a linear, convolution or norm layer with a weight."""
    is_norm = "norm" in type(module).__name__.lower()
    return (is_norm or isinstance(module, nn.Linear | nn.Conv2d)) and getattr(module, "weight", None) is not None
