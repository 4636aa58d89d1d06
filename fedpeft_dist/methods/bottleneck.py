"""The bottleneck that adapters are made of, and the two ways to put a module on a layer.

    serial    y = layer(x);  y + module(y)
    parallel  layer(x) + module(x)

Shapes: L lanes, R rows, T tokens, D width, H bottleneck.
"""

from collections.abc import Callable

import torch
from torch import nn

from fedpeft_dist.lanes.ops import lane_aligned, lane_linear
from fedpeft_dist.methods.lane_model import LaneModule


class LaneBottleneck(LaneModule):
    """scale * up(activation(down(x))), with each lane's own matrices; [R, ..., D] to [R, ..., D].

    The up-projection starts at zero.

    Args:
        down: D -> H, with the initial weight and bias of the down-projection.
    """

    def __init__(
        self, name: str, down: nn.Linear, activation: Callable[[torch.Tensor], torch.Tensor], scale: float = 1.0
    ):
        super().__init__()
        bottleneck, width = down.weight.shape
        self.declare("down_weight", f"{name}.down.weight", down.weight)
        self.declare("down_bias", f"{name}.down.bias", down.bias)
        self.declare("up_weight", f"{name}.up.weight", torch.zeros(width, bottleneck, device=down.weight.device))
        self.declare("up_bias", f"{name}.up.bias", torch.zeros(width, device=down.weight.device))
        self.activation, self.scale = activation, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = lane_linear(x, self.down_weight, self.down_bias)
        hidden, bias = lane_aligned(self.activation, hidden, len(self.down_weight)), self.up_bias
        if self.scale != 1.0:  # scales H columns, not all outputs
            hidden, bias = hidden * self.scale, bias * self.scale
        return lane_linear(hidden, self.up_weight, bias)


class SerialLayer(nn.Module):
    """A layer with a residual module on its output."""

    def __init__(self, layer: nn.Module, adapter: LaneModule):
        super().__init__()
        self.layer, self.adapter = layer, adapter

    def forward(self, *inputs: object, **options: object) -> torch.Tensor:
        y = self.layer(*inputs, **options)
        return y + self.adapter(y)


class ParallelLayer(SerialLayer):
    """A layer with a module beside it, which takes the same input."""

    def forward(self, x: torch.Tensor, *more: object, **options: object) -> torch.Tensor:
        return self.layer(x, *more, **options) + self.adapter(x)
