"""Adapters (Houlsby et al. 2019, arXiv 1902.00751) on the output of each block's MLP, and the head.

    y = mlp(x);  y + up(gelu(down(y)))

The paper shares one adapter between all blocks. Only the up-projection starts at zero. The model therefore starts as
the backbone, and every matrix has a gradient from the second step on.

Shapes: R rows, T tokens, D width, H bottleneck.
"""

import torch
from torch import nn

from fedpeft_dist.backbones.timm_backbone import Backbone
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import AdapterConfig
from fedpeft_dist.lanes.ops import lane_aligned, lane_linear
from fedpeft_dist.methods.blocks import Scope
from fedpeft_dist.methods.in_place import train_head
from fedpeft_dist.methods.lane_model import FoldedLaneModel, LaneModule
from fedpeft_dist.methods.method import Method

MIXERS = ("attn", "conv_dw", "factoratt_crpe", "token_mixer", "xca")
"""The names of the part that mixes tokens in front of a block's MLP: in most transformers, ConvNeXt, CoaT,
EfficientFormer and EdgeNeXt."""


class LaneAdapter(LaneModule):
    """down D -> H, GELU, up H -> D, with each lane's own matrices; [R, T, D] to [R, T, D]."""

    def __init__(self, name: str, width: int, bottleneck: int, device: torch.device):
        super().__init__()
        down = nn.Linear(width, bottleneck, device=device)
        self.declare("down_weight", f"{name}.down.weight", down.weight)
        self.declare("down_bias", f"{name}.down.bias", down.bias)
        self.declare("up_weight", f"{name}.up.weight", torch.zeros(width, bottleneck, device=device))
        self.declare("up_bias", f"{name}.up.bias", torch.zeros(width, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = lane_linear(x, self.down_weight, self.down_bias)
        hidden = lane_aligned(nn.functional.gelu, hidden, self.down_weight.shape[0])
        return lane_linear(hidden, self.up_weight, self.up_bias)


class AdaptedMlp(nn.Module):
    """A block's MLP with a residual adapter on its output."""

    def __init__(self, mlp: nn.Module, adapter: LaneAdapter):
        super().__init__()
        self.mlp, self.adapter = mlp, adapter

    def forward(self, x: torch.Tensor, *more: object) -> torch.Tensor:
        y = self.mlp(x, *more)
        return y + self.adapter(y)


class Adapter(Method):
    config: AdapterConfig

    def build(self, backbone: Backbone) -> FoldedLaneModel:
        model, config = backbone.model, self.config
        kind, scope = type(model).__name__, Scope(model, config.blocks)
        blocks = {name: module for name, module in model.named_modules() if name in scope}
        mixing = {name: block for name, block in blocks.items() if any(hasattr(block, mixer) for mixer in MIXERS)}
        found = {f"{name}.mlp": getattr(block, "mlp", None) for name, block in mixing.items()}
        mlps = {name: mlp for name, mlp in found.items() if isinstance(getattr(mlp, "fc2", None), nn.Linear)}
        if not mlps:
            mixers = " or ".join(MIXERS)
            raise ConfigError(f"method.name: 'adapter' finds no blocks with an mlp beside {mixers} in {kind}")
        widths = sorted({mlp.fc2.out_features for mlp in mlps.values()})
        if config.shared and len(widths) > 1:
            raise ConfigError(f"method.shared: true needs blocks of one width, {kind} has {widths}; give shared: false")
        device = next(model.parameters()).device
        shared = LaneAdapter("adapter", widths[0], config.bottleneck, device) if config.shared else None
        for name, mlp in mlps.items():
            own = shared or LaneAdapter(f"{name}.adapter", mlp.fc2.out_features, config.bottleneck, device)
            model.set_submodule(name, AdaptedMlp(mlp, own))
        return train_head(backbone)
