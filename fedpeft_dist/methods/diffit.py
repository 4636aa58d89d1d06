"""DiffFit (Xie et al. 2023, arXiv 2304.06648, section 3.2): biases, norms and a scale a residual branch, and the head.

    x + gamma1 * attention(norm1(x)), then x + gamma2 * mlp(norm2(x))

Every bias and every norm layer's scale is trained in place. The scales gamma start at one, so round 0 is the backbone.
They multiply the output of the branch's last linear layer, proj or fc2, and merge into its weight W and bias b:
W' = gamma W, b' = gamma b. On a plain ViT with L blocks of width D, there are 2LD scales, D(2L + 1) norm scales and
D(11L + 2) biases: D(15L + 3) = 140,544 on ViT-B/16.

The paper fine-tunes diffusion transformers, whose class embedding it trains, too; here the head takes that place. The
paper's text leaves the scales' shape open. Its authors' later code has one for each channel, as has this file. A block
with layer scale keeps its own, frozen, beside the new one. A ConvNeXt block has one branch, and so one scale.

Shapes: L lanes, R rows, D inputs, E outputs.
"""

import torch
from torch import nn

from fedpeft_dist.backbones.deferred import device_of
from fedpeft_dist.backbones.timm_backbone import Backbone
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import DiffitConfig
from fedpeft_dist.lanes.ops import lane_affine, lane_scale
from fedpeft_dist.methods.blocks import ATTENTIONS, MIXERS, Scope, find_attentions, find_mlps
from fedpeft_dist.methods.in_place import train_biases, train_head, train_norms
from fedpeft_dist.methods.lane_model import FoldedLaneModel, LaneModule
from fedpeft_dist.methods.method import Method, Tensors

GAMMA = ".gamma"
"""The ending of a scale's name, after the name of the linear layer."""


class LaneScaledLinear(LaneModule):
    """A linear layer with a frozen weight, and each lane's own bias and scale; [R, ..., D] to [R, ..., E]."""

    def __init__(self, name: str, linear: nn.Linear):
        super().__init__()
        self.bias = None
        if linear.bias is not None:
            self.declare("bias", f"{name}.bias", linear.bias, cast=False)
            linear.bias = None
        self.declare(
            "gamma", name + GAMMA, torch.ones(linear.out_features, device=device_of(linear.weight)), cast=False
        )
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return lane_scale(y, self.gamma) if self.bias is None else lane_affine(y, self.gamma, self.gamma * self.bias)


class Diffit(Method):
    config: DiffitConfig

    def build(self, backbone: Backbone) -> FoldedLaneModel:
        model, scope, kind = backbone.model, Scope(backbone.model, self.config.blocks), type(backbone.model).__name__
        mlps, attentions = find_mlps(model, scope), find_attentions(model, scope)
        if not mlps:
            mixers = " or ".join(MIXERS)
            raise ConfigError(f"method.name: 'diffit' finds no blocks with {mixers} and an mlp in {kind}")
        for name, _ in model.named_modules():
            if name in scope and name.rpartition(".")[2] in ATTENTIONS and name not in attentions:
                raise ConfigError(f"method.name: 'diffit' does not fit {kind}: {name} has no last linear layer `proj`")
        branches = {f"{name}.fc2": mlp.fc2 for name, mlp in mlps.items()}
        branches |= {f"{name}.proj": attention.proj for name, attention in attentions.items()}
        train_norms(model, scope, self.config.name)
        for name, linear in branches.items():
            model.set_submodule(name, LaneScaledLinear(name, linear))
        train_biases(model, scope, self.config.name)
        return train_head(backbone)

    def merge(self, backbone: Tensors, trained: Tensors) -> dict[str, torch.Tensor]:
        """Multiplies the rows of weights and biases by the scales, in float64."""
        merged = {**backbone, **{name: tensor for name, tensor in trained.items() if not name.endswith(GAMMA)}}
        for name, gamma in trained.items():
            if name.endswith(GAMMA):
                layer = name.removesuffix(GAMMA)
                for own in (f"{layer}.weight", f"{layer}.bias"):
                    if own in merged:
                        rows = merged[own].double().mul(gamma.double().view(-1, *[1] * (merged[own].dim() - 1)))
                        merged[own] = rows.to(merged[own].dtype)
        return merged
