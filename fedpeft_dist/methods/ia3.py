"""(IA)^3 (Liu et al. 2022, arXiv 2205.05638): scales of keys, values and the MLP's inner activations, and the head.

    softmax(Q (l_k * K)^T / sqrt(d)) (l_v * V);   fc2(l_ff * gelu(fc1(x)))                            (section 3.3)

All scales start at 1, so round 0 is the backbone. Keys and values are the outputs of the linear layer that makes them,
before a norm of the keys where the backbone has one. EVA and BEiT add the biases of keys and values after that layer:
these biases are not scaled.

Parameters of a block: 2 D + H. ViT-B/16, H = 4 D: 6 * D * 12 = 55,296.

Shapes: L lanes, R rows, T tokens, D width of keys and values, H inputs of fc2, E outputs.
"""

from typing import Any

import torch
from torch import nn

from fedpeft_dist.backbones.deferred import device_of
from fedpeft_dist.backbones.timm_backbone import Backbone
from fedpeft_dist.config.schema import Ia3Config
from fedpeft_dist.lanes.ops import lane_scale
from fedpeft_dist.methods.in_place import train_head
from fedpeft_dist.methods.lane_model import FoldedLaneModel, LaneModule
from fedpeft_dist.methods.method import Method, Tensors
from fedpeft_dist.methods.targets import PARTS, check_layers_are_called, find_targets, parts_of, replace_layer

MARK = ".ia3_"
"""Stands between a layer's name and its target, in the name of a trained scale."""


class LaneScaledOutputs(LaneModule):
    """A frozen linear layer whose outputs, or parts of them, each lane scales by itself; [R, T, D] to [R, T, E]."""

    def __init__(self, name: str, linear: nn.Linear, targets: tuple[str, ...]):
        super().__init__()
        self.linear, self.targets = linear, targets
        self.in_parts = bool(parts_of(name, targets))
        self.width = linear.out_features // 3 if self.in_parts else linear.out_features
        for target in targets:
            self.declare(target, name + MARK + target, torch.ones(self.width, device=device_of(linear.weight)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scales = [getattr(self, target) for target in self.targets]
        if self.in_parts:
            ones = torch.ones_like(scales[0])
            scales = [getattr(self, part) if part in self.targets else ones for part in PARTS]
        return lane_scale(self.linear(x), torch.cat(scales, dim=1))


class LaneScaledInputs(LaneModule):
    """A frozen linear layer whose inputs each lane scales by itself; [R, T, H] to [R, T, E]."""

    def __init__(self, name: str, linear: nn.Linear, target: str):
        super().__init__()
        self.declare("scale", name + MARK + target, torch.ones(linear.in_features, device=device_of(linear.weight)))
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(lane_scale(x, self.scale))


class Ia3(Method):
    config: Ia3Config

    def build(self, backbone: Backbone) -> FoldedLaneModel:
        model = backbone.model
        for name, targets in find_targets(backbone, self.config.targets, self.config.blocks).items():
            linear = model.get_submodule(name)
            scaled = LaneScaledInputs(name, linear, "fc2") if "fc2" in targets else None
            replace_layer(model, name, scaled or LaneScaledOutputs(name, linear, targets))
        return train_head(backbone)

    def merge(self, backbone: Tensors, trained: Tensors) -> dict[str, torch.Tensor]:
        """Multiplies the rows, or for fc2 the columns, of the weights, and the rows' biases, in float64."""
        scales = _scales_of_layers(trained)
        merged = dict(backbone) | {name: tensor for name, tensor in trained.items() if MARK not in name}
        for layer, (scale, is_input) in scales.items():
            weight, bias = backbone[f"{layer}.weight"], backbone.get(f"{layer}.bias")
            scale = scale.double()
            merged[f"{layer}.weight"] = (weight.double() * (scale if is_input else scale[:, None])).to(weight.dtype)
            if bias is not None and not is_input:
                merged[f"{layer}.bias"] = (bias.double() * scale).to(bias.dtype)
        return merged

    def to_peft(self, model: nn.Module, trained: Tensors) -> tuple[dict[str, Any], Tensors]:
        """peft has one scale for all outputs of a fused layer: it is 1 for the queries.

        Raises:
            ConfigError: the model reads a layer's weight by itself, so peft could not replace the layer.
        """
        scales = _scales_of_layers(trained)
        check_layers_are_called(model, scales)
        tensors = {name: tensor for name, tensor in trained.items() if MARK not in name}
        for layer, (scale, is_input) in scales.items():
            tensors[f"{layer}.ia3_l"] = scale.view(1, -1) if is_input else scale.view(-1, 1)
        return {
            "peft_type": "IA3",
            "target_modules": list(scales),
            "feedforward_modules": [layer for layer, (_, is_input) in scales.items() if is_input],
            "fan_in_fan_out": False,
            "init_ia3_weights": True,
        }, tensors


def _scales_of_layers(trained: Tensors) -> dict[str, tuple[torch.Tensor, bool]]:
    """Each layer's scale of all its outputs, or of its inputs, and whether it is that of its inputs."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in trained.items():
        layer, _, target = name.rpartition(MARK)
        if layer:
            found.setdefault(layer, {})[target] = tensor
    scales = {}
    for layer, own in found.items():
        first = next(iter(own.values()))
        if parts_of(layer, tuple(own)):
            own = {part: own.get(part, torch.ones_like(first)) for part in PARTS}
        scales[layer] = torch.cat(list(own.values())), "fc2" in own
    return scales
