"""DoRA (Liu et al. 2024, arXiv 2402.09353): LoRA, whose sum with the weight has a trained magnitude, and the head.

    W' = m * (W + s B A) / ||W + s B A||;   y = W' x + bias                                            (equation 5)

m and the norms have one value for each output, as in the paper's code. The paper's text speaks of the columns of W.
B starts at 0 and m at ||W||, so round 0 is the backbone. The norm is a constant for the gradient, as the paper proposes
in section 4.3. Dropout acts on the input of A alone.

No lane ever holds its own W'. A lane's norms follow from products of rank r, in float64:

    ||W + s B A||^2 = ||W||^2 + 2 s <B, W A^T> + s^2 <B, B (A A^T)>      (inner products row by row)

Parameters of a layer: r (D + E) + E. ViT-B/16 with rank 8 on qkv: 294,912 + 27,648 = 322,560.

Shapes: L lanes, R rows, T tokens, D inputs, E outputs, r rank.
"""

from typing import Any

import torch
from torch import nn

from fedpeft_dist.backbones.deferred import device_of, made
from fedpeft_dist.config.schema import DoraConfig
from fedpeft_dist.lanes.dropout import make_dropout
from fedpeft_dist.lanes.ops import lane_affine, lane_linear, lane_scale
from fedpeft_dist.methods.lane_model import LaneModule
from fedpeft_dist.methods.lora import A, B, Lora, initial_a
from fedpeft_dist.methods.method import Tensors

MAGNITUDE = ".lora_magnitude_vector"
"""The ending of a magnitude's name, after the name of the linear layer."""
TINY = 1e-30
"""Keeps an output whose weights are all zero at zero."""


class LaneDora(LaneModule):
    """A frozen linear layer with each lane's own low-rank update and magnitudes; [R, T, D] to [R, T, E]."""

    def __init__(self, name: str, linear: nn.Linear, config: DoraConfig, target: str):
        super().__init__()
        rank, device = config.rank_of(target), device_of(linear.weight)
        squares = made(linear.weight).detach().double().square().sum(dim=1)
        self.declare("a", name + A, initial_a(rank, linear))
        self.declare("b", name + B, torch.zeros(linear.out_features, rank, device=device))
        self.declare("magnitude", name + MAGNITUDE, squares.sqrt().float(), cast=False)
        self.register_buffer("squares", squares, persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)
        linear.bias = None
        self.linear, self.scale = linear, config.scale_of(target)
        self.dropout = make_dropout(config.dropout, name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = lane_linear(self.dropout(x), self.a) * self.scale
        y = self.linear(x) + lane_linear(hidden, self.b)
        factor = self.magnitude / self.norms().to(self.magnitude.dtype)
        if self.bias is None:
            return lane_scale(y, factor)
        return lane_affine(y, factor, self.bias.expand_as(factor))

    @torch.no_grad()
    def norms(self) -> torch.Tensor:
        """The norm of each output's weights, W + s B A: float64 [L, E]."""
        products = self.linear(self.a.flatten(0, 1)).unflatten(0, self.a.shape[:2]).mT  # W A^T [L, E, r]
        a, b = self.a.double(), self.b.double()
        update = 2 * self.scale * products.double() + self.scale**2 * torch.bmm(b, torch.bmm(a, a.mT))
        return (self.squares + (b * update).sum(dim=-1)).clamp_min(TINY).sqrt()


class Dora(Lora):
    config: DoraConfig
    layer_class = LaneDora

    def merge(self, backbone: Tensors, trained: Tensors) -> dict[str, torch.Tensor]:
        """Adds the matrices' products to the weights and gives each row its magnitude, in float64."""
        merged = dict(backbone)
        for name, tensor in trained.items():
            if name.endswith(MAGNITUDE):
                layer = name.removesuffix(MAGNITUDE)
                weight, product = backbone[f"{layer}.weight"], trained[layer + B].double() @ trained[layer + A].double()
                own = weight.double() + self.scale(layer) * product
                factor = tensor.double() / own.norm(dim=1).clamp_min(TINY)
                merged[f"{layer}.weight"] = (own * factor.unsqueeze(1)).to(weight.dtype)
            elif not name.endswith((A, B)):
                merged[name] = tensor
        return merged

    def to_peft(self, model: nn.Module, trained: Tensors) -> tuple[dict[str, Any], Tensors]:
        keys, tensors = super().to_peft(model, trained)
        return {**keys, "use_dora": True}, tensors
