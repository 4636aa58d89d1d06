"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454): scales of a frozen random low-rank path, and the head.

    y = frozen(x) + b * (B (d * (A dropout(x))))                                                       (equation 2)

A [r, D] and B [E, r] are random and never trained. One pair, of the largest sizes, serves all layers; a smaller layer
takes its first columns and rows. The pair follows from `projection_seed` alone, by the same draws as in Hugging Face
peft. So it is neither sent nor stored, and a merge or an export makes it again. d starts at `initial`, b at 0, so round
0 is the backbone.

Parameters of a layer: E + r. ViT-B/16 with rank 256 on all four layers of a block: 12 * (9 D + 4 r) = 95,232.

Shapes: R rows, T tokens, D inputs, E outputs, r rank.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fedpeft_dist.backbones.deferred import device_of
from fedpeft_dist.backbones.timm_backbone import Backbone
from fedpeft_dist.config.schema import VeraConfig
from fedpeft_dist.lanes.dropout import make_dropout
from fedpeft_dist.lanes.ops import lane_scale
from fedpeft_dist.methods.in_place import train_head
from fedpeft_dist.methods.lane_model import FoldedLaneModel, LaneModule
from fedpeft_dist.methods.method import Method, Tensors
from fedpeft_dist.methods.targets import check_layers_are_called, find_targets, replace_layer

OUTER, INNER = ".vera_lambda_b", ".vera_lambda_d"
"""The endings of the trained scales' names, after the name of the linear layer."""


class Projections:
    """The frozen pair of matrices for layers of these sizes.

    Args:
        shapes: (E, D) of each layer.
    """

    def __init__(self, config: VeraConfig, shapes: Iterable[tuple[int, ...]]):
        outputs, inputs = (max(sizes) for sizes in zip(*shapes))
        generator = torch.Generator().manual_seed(config.projection_seed)
        self.a = nn.init.kaiming_uniform_(torch.empty(config.rank, inputs), generator=generator)
        self.b = nn.init.kaiming_uniform_(torch.empty(outputs, config.rank), generator=generator)
        self.parameters: dict[tuple[str, int], nn.Parameter] = {}

    def down(self, inputs: int) -> torch.Tensor:
        return self.a[:, :inputs]

    def up(self, outputs: int) -> torch.Tensor:
        return self.b[:outputs]

    def layers_for(self, linear: nn.Linear) -> tuple[nn.Linear, nn.Linear]:
        """A and B as frozen layers. Those of equal size share their memory."""
        return self._layer("down", linear.in_features, linear), self._layer("up", linear.out_features, linear)

    def _layer(self, side: str, size: int, like: nn.Linear) -> nn.Linear:
        if (side, size) not in self.parameters:
            matrix = getattr(self, side)(size).to(device_of(like.weight)).contiguous()
            self.parameters[side, size] = nn.Parameter(matrix, requires_grad=False)
        weight = self.parameters[side, size]
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = weight
        return layer


class LaneVera(LaneModule):
    """A frozen linear layer beside a frozen random path with each lane's own scales; [R, T, D] to [R, T, E]."""

    def __init__(self, name: str, linear: nn.Linear, config: VeraConfig, projections: Projections):
        super().__init__()
        device = device_of(linear.weight)
        self.declare("outer", name + OUTER, torch.zeros(linear.out_features, device=device))
        self.declare("inner", name + INNER, torch.full((config.rank,), config.initial, device=device))
        self.linear = linear
        self.down, self.up = projections.layers_for(linear)
        self.dropout = make_dropout(config.dropout, name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = lane_scale(self.down(self.dropout(x)), self.inner)
        return self.linear(x) + lane_scale(self.up(hidden), self.outer)


class Vera(Method):
    config: VeraConfig

    def build(self, backbone: Backbone) -> FoldedLaneModel:
        model, config = backbone.model, self.config
        linears = {name: model.get_submodule(name) for name in find_targets(backbone, config.targets, config.blocks)}
        projections = Projections(config, [tuple(linear.weight.shape) for linear in linears.values()])
        for name, linear in linears.items():
            replace_layer(model, name, LaneVera(name, linear, config, projections))
        return train_head(backbone)

    def merge(self, backbone: Tensors, trained: Tensors) -> dict[str, torch.Tensor]:
        """Adds the products of the scaled matrices to the weights, in float64."""
        layers, rest = _split(trained)
        projections = Projections(self.config, [tuple(backbone[f"{layer}.weight"].shape) for layer in layers])
        merged = {**backbone, **rest}
        for layer in layers:
            weight, device = backbone[f"{layer}.weight"], backbone[f"{layer}.weight"].device
            up, down = projections.up(len(weight)).to(device), projections.down(weight.shape[1]).to(device)
            outer, inner = trained[layer + OUTER].double(), trained[layer + INNER].double()
            update = (outer[:, None] * up.double()) @ (inner[:, None] * down.double())
            merged[f"{layer}.weight"] = (weight.double() + update).to(weight.dtype)
        return merged

    def to_peft(self, model: nn.Module, trained: Tensors) -> tuple[dict[str, Any], Tensors]:
        """
        Raises:
            ConfigError: the model reads a layer's weight by itself, so peft could not replace the layer.
        """
        layers, _ = _split(trained)
        check_layers_are_called(model, layers)
        adapted = [model.get_submodule(layer) for layer in layers]
        linears = [module.linear if isinstance(module, LaneVera) else module for module in adapted]
        projections = Projections(self.config, [tuple(linear.weight.shape) for linear in linears])
        return {
            "peft_type": "VERA",
            "r": self.config.rank,
            "target_modules": layers,
            "vera_dropout": self.config.dropout,
            "d_initial": self.config.initial,
            "projection_prng_key": self.config.projection_seed,
            "save_projection": True,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_weights": True,
        }, {**trained, "base_model.vera_A": projections.a, "base_model.vera_B": projections.b}


def _split(trained: Tensors) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The names of the adapted layers, and the tensors that belong to none of them."""
    rest = {name: tensor for name, tensor in trained.items() if not name.endswith((OUTER, INNER))}
    return [name.removesuffix(OUTER) for name in trained if name.endswith(OUTER)], rest
