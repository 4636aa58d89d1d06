"""The methods that add modules to blocks, as their papers read, in ordinary PyTorch. ADDED maps a method to its function.

A function changes a model in place and returns it, or a model around it, with the method's parameters by the names they
are sent under.

Shapes: B batch, T tokens, D width, H bottleneck.
"""

from __future__ import annotations

import torch
from torch import nn

Trained = tuple[nn.Module, dict[str, nn.Parameter]]
ATTENTIONS = ("attn", "xca", "token_mixer", "factoratt_crpe")
"""Names of the attention in the blocks of timm's families."""


def parts_of(model: nn.Module, names: tuple[str, ...], last: str) -> list[nn.Module]:
    """The layers so called, in blocks that mix tokens, whose last layer is linear."""
    blocks = [m for m in model.modules() if any(hasattr(m, mixer) for mixer in (*ATTENTIONS, "conv_dw"))]
    parts = [getattr(block, name) for block in blocks for name in names if hasattr(block, name)]
    parts = [part for part in parts if isinstance(getattr(part, last, None), nn.Linear)]
    assert parts
    return parts


def named(model: nn.Module, part: str) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if part in name.split(".")}


class Bottleneck(nn.Module):
    """scale * up(activation(down(x)))."""

    def __init__(self, width: int, bottleneck: int, activation: nn.Module, scale: float = 1.0):
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.activation, self.scale = activation, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.up(self.activation(self.down(x)))


def adaptformer(model: nn.Module, bottleneck: int, scale: float) -> Trained:
    for mlp in parts_of(model, ("mlp",), "fc2"):
        mlp.adapter = Bottleneck(mlp.fc2.out_features, bottleneck, nn.ReLU(), scale)
        mlp.register_forward_hook(lambda mlp, inputs, y: y + mlp.adapter(inputs[0]))
    return model, named(model, "adapter")


def houlsby(model: nn.Module, bottleneck: int) -> Trained:
    for names, last in ((ATTENTIONS, "proj"), (("mlp",), "fc2")):
        for layer in parts_of(model, names, last):
            layer.adapter = Bottleneck(getattr(layer, last).out_features, bottleneck, nn.GELU())
            layer.register_forward_hook(lambda layer, _, y: y + layer.adapter(y))
    return model, named(model, "adapter")


ADDED = {"adaptformer": adaptformer, "houlsby": houlsby}
