"""LoRA (Hu et al. 2021, arXiv 2106.09685) on the linear layers of each transformer block, and the head.

    y = frozen(x) + alpha / rank * B(A(dropout(x)))

B starts at zero, so round 0 is the backbone. rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) scales by
alpha / sqrt(rank). The queries, keys and values of a fused layer may have matrices of their own, with ranks of their
own. They share one dropout, because they share their input.

Parameters of a layer: r * (D + E); of a part of a fused layer: r * (D + E / 3). ViT-B/16 with rank 8: qkv 294,912; q
and v 294,912; all four layers 1,179,648.

Shapes: R rows, T tokens, D inputs, E outputs, r rank.
"""

import math
from typing import Any

import torch
from torch import nn

from fedpeft_dist.backbones.deferred import device_of
from fedpeft_dist.backbones.timm_backbone import Backbone
from fedpeft_dist.config.schema import LoraConfig
from fedpeft_dist.lanes.dropout import make_dropout
from fedpeft_dist.lanes.ops import lane_linear
from fedpeft_dist.methods.in_place import train_head
from fedpeft_dist.methods.lane_model import FoldedLaneModel, LaneModule
from fedpeft_dist.methods.method import Method, Tensors
from fedpeft_dist.methods.targets import (
    PARTS,
    check_layers_are_called,
    find_targets,
    is_place,
    pad_part,
    parts_of,
    replace_layer,
    rows_of,
)

A, B = ".lora_A.weight", ".lora_B.weight"
"""The endings of the trained matrices' names, after the name of the linear layer, or of its part."""


def initial_a(rank: int, linear: nn.Linear) -> torch.Tensor:
    """A [r, D] before the first round."""
    a = torch.empty(rank, linear.in_features, device=device_of(linear.weight))
    return nn.init.kaiming_uniform_(a, a=math.sqrt(5))


class LaneLora(LaneModule):
    """A frozen linear layer with each lane's own low-rank update beside it; [R, T, D] to [R, T, E]."""

    def __init__(self, name: str, linear: nn.Linear, config: LoraConfig, target: str):
        super().__init__()
        rank, device = config.rank_of(target), device_of(linear.weight)
        self.declare("a", name + A, initial_a(rank, linear))
        self.declare("b", name + B, torch.zeros(linear.out_features, rank, device=device))
        self.linear = linear
        self.scale = config.scale_of(target)
        self.dropout = make_dropout(config.dropout, name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = lane_linear(self.dropout(x), self.a) * self.scale  # scales `rank` columns, not all outputs
        return self.linear(x) + lane_linear(hidden, self.b)


class LanePartsLora(LaneModule):
    """A frozen fused layer with low-rank updates of some of its parts; [R, T, D] to [R, T, E].

    The parts' A stand below each other, their B in a matrix with zeros elsewhere, so that two products compute all.
    """

    def __init__(self, name: str, linear: nn.Linear, config: LoraConfig, parts: tuple[str, ...]):
        super().__init__()
        width, device = linear.out_features // 3, device_of(linear.weight)
        for part in parts:
            rank = config.rank_of(part)
            self.declare(f"{part}_a", f"{name}.{part}{A}", initial_a(rank, linear))
            self.declare(f"{part}_b", f"{name}.{part}{B}", torch.zeros(width, rank, device=device))
        self.linear, self.scales = linear, {part: config.scale_of(part) for part in parts}
        self.dropout = make_dropout(config.dropout, name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = torch.cat([getattr(self, f"{part}_a") for part in self.scales], dim=1)
        scaled = {part: getattr(self, f"{part}_b") * scale for part, scale in self.scales.items()}
        b = torch.cat([pad_part(own, part) for part, own in scaled.items()], dim=2)
        return self.linear(x) + lane_linear(lane_linear(self.dropout(x), a), b)


class Lora(Method):
    config: LoraConfig
    layer_class = LaneLora

    def build(self, backbone: Backbone) -> FoldedLaneModel:
        model, config = backbone.model, self.config
        for name, targets in find_targets(backbone, config.targets, config.blocks).items():
            linear, parts = model.get_submodule(name), parts_of(name, targets)
            if parts:
                replace_layer(model, name, LanePartsLora(name, linear, config, parts))
            else:
                replace_layer(model, name, self.layer_class(name, linear, config, *targets))
        return train_head(backbone)

    def merge(self, backbone: Tensors, trained: Tensors) -> dict[str, torch.Tensor]:
        """Adds the matrices' products to the weights, in float64."""
        merged = dict(backbone)
        for name, tensor in trained.items():
            if name.endswith(A):
                place = name.removesuffix(A)
                layer, part = _layer_and_part(place)
                weight, product = merged[f"{layer}.weight"], trained[place + B].double() @ tensor.double()
                own = weight.to(torch.float64, copy=True)
                own[rows_of(part, len(own)) if part else slice(None)] += self.scale(place) * product
                merged[f"{layer}.weight"] = own.to(weight.dtype)
            elif not name.endswith(B):
                merged[name] = tensor
        return merged

    def to_peft(self, model: nn.Module, trained: Tensors) -> tuple[dict[str, Any], Tensors]:
        """peft has one pair of matrices for a fused layer. It gets the parts' A below each other, and their scaled B in
        one matrix with zeros elsewhere.

        Raises:
            ConfigError: the model reads a layer's weight by itself, so peft could not replace the layer.
        """
        config, places = self.config, {}
        for place in (name.removesuffix(A) for name in trained if name.endswith(A)):
            places.setdefault(_layer_and_part(place)[0], []).append(place)
        check_layers_are_called(model, places)
        tensors = {name: tensor for name, tensor in trained.items() if not name.endswith((A, B))}
        ranks, alphas = {}, {}
        for layer, own in places.items():
            a, b = torch.cat([trained[place + A] for place in own]), trained[own[0] + B]
            if own != [layer]:
                scaled = {_layer_and_part(place)[1]: trained[place + B] * self.scale(place) for place in own}
                b = torch.cat([pad_part(tensor, part) for part, tensor in scaled.items()], dim=1)
                alphas[layer] = math.sqrt(len(a)) if config.rslora else len(a)  # a scale of 1
            if len(a) != config.rank:
                ranks[layer] = len(a)
            tensors |= {layer + A: a, layer + B: b}
        return {
            "peft_type": "LORA",
            "r": config.rank,
            "rank_pattern": ranks,
            "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
            "alpha_pattern": alphas,
            "lora_dropout": config.dropout,
            "target_modules": list(places),
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "use_rslora": config.rslora,
        }, tensors

    def scale(self, place: str) -> float:
        """The factor of the update of a linear layer, or of a part of one."""
        layer, part = _layer_and_part(place)
        return self.config.scale_of(part or next(t for t in self.config.targets if is_place(layer, t)))


def _layer_and_part(place: str) -> tuple[str, str]:
    """A linear layer's name, and the part of the layer, which is empty if the place is the whole layer."""
    layer, _, last = place.rpartition(".")
    return (layer, last) if last in PARTS and layer.endswith("qkv") else (place, "")
