"""LoRA (Hu et al. 2021, arXiv 2106.09685) on the linear layers of each transformer block, and the head.

    y = frozen(x) + alpha / rank * B(A(dropout(x)))

B starts at zero, so that round 0 is the backbone.

Shapes: R rows, T tokens, D inputs, E outputs, r rank.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from fedpeft_dist.backbones.timm_backbone import Backbone
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import LoraConfig
from fedpeft_dist.lanes.dropout import make_dropout
from fedpeft_dist.lanes.ops import lane_linear
from fedpeft_dist.methods.head import train_head
from fedpeft_dist.methods.lane_model import FoldedLaneModel, LaneModule, replace_module

# Where a target may lie in a block: `proj` is the attention's, never the patch embedding's.
TARGETS = {
    "qkv": ("attn.qkv", "token_mixer.qkv", "xca.qkv"),
    "proj": ("attn.proj", "token_mixer.proj", "xca.proj"),
    "fc1": ("mlp.fc1",),
    "fc2": ("mlp.fc2",),
}


class LaneLora(LaneModule):
    """A frozen linear layer with each lane's own low-rank update beside it; [R, T, D] to [R, T, E]."""

    def __init__(self, name: str, linear: nn.Linear, config: LoraConfig):
        super().__init__()
        device = linear.weight.device
        a = torch.empty(config.rank, linear.in_features, device=device)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        self.declare("a", f"{name}.lora_A.weight", a)
        self.declare("b", f"{name}.lora_B.weight", torch.zeros(linear.out_features, config.rank, device=device))
        self.linear = linear
        self.scale = config.alpha / config.rank
        self.dropout = make_dropout(config.dropout, name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = lane_linear(self.dropout(x), self.a) * self.scale  # the scale on rank columns, not on the outputs
        return self.linear(x) + lane_linear(hidden, self.b)


def build_lora(backbone: Backbone, config: LoraConfig) -> FoldedLaneModel:
    """
    Raises:
        ConfigError: a target that matches no linear layer.
    """
    model = backbone.model
    endings = {target: tuple(f".{place}" for place in TARGETS[target]) for target in dict.fromkeys(config.targets)}
    matched = dict.fromkeys(endings, 0)
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or module in backbone.shared_layers:
            continue
        for target, ending in endings.items():
            if f".{name}".endswith(ending):
                attention = replace_module(model, name, LaneLora(name, module, config))
                if target == "qkv" and hasattr(attention, "qkv_bias_separate"):
                    attention.qkv_bias_separate = True  # else BEiT, EVA and SwinV2 read only the frozen weight
                matched[target] += 1
    for target, count in matched.items():
        if not count:
            places = " or ".join(TARGETS[target])
            raise ConfigError(
                f"method.targets: {target!r} matches no linear layer ({places}) in {type(model).__name__}"
            )
    train_head(backbone)
    return FoldedLaneModel(backbone)
