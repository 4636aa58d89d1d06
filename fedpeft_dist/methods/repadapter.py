"""RepAdapter (Luo et al. 2023, arXiv 2302.08106): a linear adapter in front of attention and MLP, and the head.

    n = norm(x);  qkv(n + scale * up(down(n))), and the same in front of the MLP's fc1

`up` is grouped: the hidden values and the outputs are cut into g parts, and a part of the outputs follows from one part
of the hidden values. It starts at zero, so round 0 is the backbone. All is linear, so the trained adapter merges into
the weight W of the linear layer behind it: W' = W + scale * W up down. An adapter has DH + DH/g parameters, L blocks
2L (DH + DH/g), for width D and bottleneck H: 221,184 on ViT-B/16 at H = 8 and g = 2.

The paper's code adds a bias to both projections, which its formula leaves out (2L (H + D) more), and drops 10 % of the
hidden values. In ConvNeXt it puts an adapter in front of the depthwise convolution; here ConvNeXt is refused. A gated
attention's gate reads n itself.

Shapes: L lanes, R rows, D width, E outputs, H bottleneck, g groups.
"""

import torch
from torch import nn

from fedpeft_dist.backbones.deferred import device_of
from fedpeft_dist.backbones.timm_backbone import Backbone
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import RepadapterConfig
from fedpeft_dist.lanes.ops import lane_linear
from fedpeft_dist.methods.blocks import Scope
from fedpeft_dist.methods.in_place import train_head
from fedpeft_dist.methods.lane_model import FoldedLaneModel, LaneModule
from fedpeft_dist.methods.method import Method, Tensors
from fedpeft_dist.methods.targets import PLACES, is_place, replace_layer

TARGETS = {"qkv": "attention", "fc1": "mlp"}
"""The linear layers that an adapter stands in front of, and their part of a block."""
DOWN, UP = ".adapter.down", ".adapter.up"
"""The endings of the trained matrices' names, after the name of the linear layer."""


class LaneRepAdapter(LaneModule):
    """A frozen linear layer behind each lane's own linear adapter; [R, ..., D] to [R, ..., E]."""

    def __init__(self, name: str, linear: nn.Linear, config: RepadapterConfig):
        super().__init__()
        width, hidden, groups, device = linear.in_features, config.bottleneck, config.groups, device_of(linear.weight)
        down = nn.init.xavier_uniform_(torch.empty(hidden, width, device=device))
        self.declare("down", name + DOWN, down)
        self.declare("up", name + UP, torch.zeros(groups, width // groups, hidden // groups, device=device))
        self.linear, self.scale = linear, config.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = lane_linear(x, self.down) * self.scale  # scales H columns, not all outputs
        return self.linear(x + lane_linear(hidden, ungroup(self.up)))


def ungroup(up: torch.Tensor) -> torch.Tensor:
    """The grouped matrix [..., g, D/g, H/g] as one block-diagonal matrix [..., D, H]."""
    blocks = torch.diag_embed(up.movedim(-3, -1)).movedim((-2, -1), (-4, -2))  # [..., g, D/g, g, H/g]
    return blocks.flatten(-4, -3).flatten(-2, -1)


class Repadapter(Method):
    config: RepadapterConfig

    def build(self, backbone: Backbone) -> FoldedLaneModel:
        model, scope = backbone.model, Scope(backbone.model, self.config.blocks)
        kind, groups = type(model).__name__, self.config.groups
        linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name in scope}
        layers = [name for name, linear in linears.items() if linear not in backbone.shared_layers]
        for target, part in TARGETS.items():
            if not any(is_place(name, target) for name in layers):
                sought = " or ".join(PLACES[target])
                raise ConfigError(f"method.name: 'repadapter' finds no linear layer {sought} of an {part} in {kind}")
        for name in (name for name in layers if any(is_place(name, target) for target in TARGETS)):
            if linears[name].in_features % groups:
                width = linears[name].in_features
                raise ConfigError(f"method.groups: {groups} does not divide the width {width} of {kind}")
            replace_layer(model, name, LaneRepAdapter(name, linears[name], self.config))
        return train_head(backbone)

    def merge(self, backbone: Tensors, trained: Tensors) -> dict[str, torch.Tensor]:
        """Multiplies the weights by the adapters, in float64."""
        merged = dict(backbone)
        for name, tensor in trained.items():
            if name.endswith(DOWN):
                layer = name.removesuffix(DOWN)
                weight, up = backbone[f"{layer}.weight"], ungroup(trained[layer + UP].double())
                change = self.config.scale * (weight.double() @ up @ tensor.double())
                merged[f"{layer}.weight"] = (weight.double() + change).to(weight.dtype)
            elif not name.endswith(UP):
                merged[name] = tensor
        return merged
