"""Prefix tuning (Li & Liang 2021, arXiv 2101.00190): learned keys and values in each block's attention, and the head.

    softmax(q [keys; k]^T / sqrt(d)) [values; v]

A block has P keys and P values of width D, L blocks 2LPD parameters: 184,320 on ViT-B/16 at P = 10. Keys and values
start as small normal numbers. Round 0 is near the backbone but not the backbone, because a key takes its part of the
softmax whatever its value.

The paper makes keys and values by an MLP of smaller ones while it trains, for stability; here they are trained
themselves, as the paper uses them afterwards. The attention's norm of keys, if it has one, sees the learned keys, too.
Rotary positions turn the image's keys alone.

The attention gets P tokens in front, for which its layer qkv gives a query of zero and the learned key and value. What
it computes for them is thrown away. So timm's own attention stays as it is.

Shapes: L lanes, R rows, T tokens, P learned tokens, D width.
"""

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fedpeft_dist.backbones.deferred import device_of
from fedpeft_dist.backbones.timm_backbone import Backbone
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import PrefixConfig
from fedpeft_dist.lanes.ops import lane_tokens
from fedpeft_dist.methods.blocks import Scope, find_attentions
from fedpeft_dist.methods.in_place import train_head
from fedpeft_dist.methods.lane_model import FoldedLaneModel, LaneModule
from fedpeft_dist.methods.method import Method

DEVIATION = 0.02
"""Standard deviation of the initial keys and values, as of timm's class tokens."""


class LanePrefix(LaneModule):
    """A frozen layer qkv that gives P tokens each lane's own keys and values; [R, P + T, D] to [R, P + T, 3D]."""

    def __init__(self, name: str, qkv: nn.Linear, tokens: int):
        super().__init__()
        for kind in ("keys", "values"):
            initial = torch.empty(tokens, qkv.out_features // 3, device=device_of(qkv.weight)).normal_(std=DEVIATION)
            self.declare(kind, f"{name}.{kind}", initial, cast=False)
        self.qkv, self.tokens = qkv, tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = self.qkv(x[:, self.tokens :])
        learned = torch.cat([torch.zeros_like(self.keys), self.keys, self.values], dim=-1)
        return torch.cat([lane_tokens(learned, x.shape[0]).to(own.dtype), own], dim=1)


class PrefixedAttention(nn.Module):
    """An attention that sees learned tokens in front of the image's own; [R, T, D] to [R, T, D]."""

    def __init__(self, attention: nn.Module, name: str, tokens: int):
        super().__init__()
        _give_bias_to_layer(attention)
        attention.qkv = LanePrefix(f"{name}.prefix", attention.qkv, tokens)
        if hasattr(attention, "num_prefix_tokens"):
            attention.num_prefix_tokens += tokens  # these have no rotary position
        self.attention, self.tokens = attention, tokens

    def forward(self, x: torch.Tensor, *more: object, **options: object) -> torch.Tensor:
        x = nn.functional.pad(x, (0, 0, self.tokens, 0))
        return self.attention(x, *more, **options)[:, self.tokens :]


class Prefix(Method):
    config: PrefixConfig

    def build(self, backbone: Backbone) -> FoldedLaneModel:
        model, kind = backbone.model, type(backbone.model).__name__
        attentions = find_attentions(model, Scope(model, self.config.blocks))
        fits = isinstance(model, VisionTransformer | Eva) and attentions
        if not fits or not all(isinstance(getattr(own, "qkv", None), nn.Linear) for own in attentions.values()):
            known = "timm's VisionTransformer and Eva with one layer qkv a block"
            raise ConfigError(f"method.name: 'prefix' fits {known}, not this {kind}")
        for name, attention in attentions.items():
            model.set_submodule(name, PrefixedAttention(attention, name, self.config.tokens))
        return train_head(backbone)


def _give_bias_to_layer(attention: nn.Module) -> None:
    """EVA's attention adds biases behind its layer qkv. The learned keys and values must not get them."""
    if getattr(attention, "q_bias", None) is not None:
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias]).detach()
        attention.qkv.bias = nn.Parameter(bias, requires_grad=False)
        attention.q_bias = attention.k_bias = attention.v_bias = None
