"""The methods that add modules to blocks, as their papers read, in ordinary PyTorch.

ADDED maps a method to its function.

A function changes a model in place and returns it, or a model around it, with the method's parameters by the names they
are sent under.

Shapes: B batch, T tokens, D width, H bottleneck.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from bare_modules import Bottleneck, Bypass
from timm.layers import apply_rot_embed_cat
from torch import nn

Trained = tuple[nn.Module, dict[str, nn.Parameter]]
ATTENTIONS = ("attn", "xca", "token_mixer", "factoratt_crpe")
"""Names of the attention in the blocks of timm's families."""


def parts_of(model: nn.Module, names: tuple[str, ...], last: str, may_lack: bool = False) -> list[nn.Module]:
    """The parts so called, in blocks that mix tokens, whose own layer `last` is linear."""
    blocks = [m for m in model.modules() if any(hasattr(m, mixer) for mixer in (*ATTENTIONS, "conv_dw"))]
    parts = [getattr(block, name) for block in blocks for name in names if hasattr(block, name)]
    parts = [part for part in parts if isinstance(getattr(part, last, None), nn.Linear)]
    assert parts or may_lack
    return parts


def named(model: nn.Module, part: str) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if part in name.split(".")}


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


class Reparameterized(nn.Module):
    """A linear layer behind x + scale * up(down(x)), whose `up` is a grouped convolution, as in the paper's code."""

    def __init__(self, linear: nn.Linear, bottleneck: int, groups: int, scale: float):
        super().__init__()
        width = linear.in_features
        self.linear, self.adapter, self.groups, self.scale = linear, nn.Module(), groups, scale
        self.adapter.down = nn.Parameter(torch.zeros(bottleneck, width))
        self.adapter.up = nn.Parameter(torch.zeros(groups, width // groups, bottleneck // groups))

    @property
    def weight(self) -> torch.Tensor:
        """The merged weight, which some attentions read in place of calling the layer."""
        return (
            self.linear.weight
            + self.scale * self.linear.weight @ torch.block_diag(*self.adapter.up) @ self.adapter.down
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.linear(x, self.adapter.down).reshape(-1, len(self.adapter.down), 1)
        change = F.conv1d(hidden, self.adapter.up.flatten(0, 1).unsqueeze(-1), groups=self.groups)
        return self.linear(x + self.scale * change.view(x.shape))


def repadapter(model: nn.Module, bottleneck: int, groups: int, scale: float) -> Trained:
    for names, layer in ((ATTENTIONS, "qkv"), (("mlp",), "fc1")):
        for part in parts_of(model, names, layer):
            setattr(part, layer, Reparameterized(getattr(part, layer), bottleneck, groups, scale))
    return model, named(model, "adapter")


def diffit(model: nn.Module) -> Trained:
    modules = {name: module for name, module in model.named_modules() if not list(module.children())}
    norms = {f"{name}.weight" for name, module in modules.items() if "Norm" in type(module).__name__}
    own = {name for name, _ in model.named_parameters() if name in norms or name.split(".")[-1] == "bias"}
    for names, last in ((ATTENTIONS, "proj"), (("mlp",), "fc2")):
        for part in parts_of(model, names, last, may_lack=True):
            linear = getattr(part, last)
            linear.gamma = nn.Parameter(torch.ones(linear.out_features))
            linear.register_forward_hook(lambda linear, _, y: linear.gamma * y)
            own |= {name for name, p in model.named_parameters() if p is linear.gamma}
    return model, {name: p for name, p in model.named_parameters() if name in own}


def convpass(model: nn.Module, bottleneck: int, scale: float) -> Trained:
    for names, last in ((("attn",), "proj"), (("mlp",), "fc2")):
        for layer in parts_of(model, names, last):
            layer.convpass = Bypass(getattr(layer, last).out_features, bottleneck, scale, model.patch_embed.grid_size)
            layer.register_forward_hook(lambda layer, inputs, y: y + layer.convpass(inputs[0]))
    return model, named(model, "convpass")


class PrefixAttention(nn.Module):
    """A ViT's or EVA's attention, written out, with learned keys and values in front of the image's own."""

    def __init__(self, attn: nn.Module, tokens: int):
        super().__init__()
        self.attn, self.prefix = attn, nn.Module()
        self.prefix.keys = nn.Parameter(torch.zeros(tokens, attn.qkv.out_features // 3))
        self.prefix.values = nn.Parameter(torch.zeros(tokens, attn.qkv.out_features // 3))

    def forward(self, x: torch.Tensor, rope: torch.Tensor | None = None, **_: object) -> torch.Tensor:
        attn, heads = self.attn, self.attn.num_heads
        bias = attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        q, k, v = F.linear(x, attn.qkv.weight, bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if rope is not None:
            first, half = attn.num_prefix_tokens, attn.rotate_half
            q, k = (
                torch.cat([t[:, :, :first], apply_rot_embed_cat(t[:, :, first:], rope, half=half)], dim=2)
                for t in (q, k)
            )
        keys, values = (
            t.unflatten(-1, (heads, -1)).transpose(0, 1).expand(len(x), -1, -1, -1)
            for t in (self.prefix.keys, self.prefix.values)
        )
        k, v = torch.cat([attn.k_norm(keys), k], dim=2), torch.cat([values, v], dim=2)
        y = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1) @ v
        return attn.proj(attn.norm(y.transpose(1, 2).flatten(2)))


def prefix(model: nn.Module, tokens: int) -> Trained:
    own = {}
    for index, block in enumerate(model.blocks):
        block.attn = PrefixAttention(block.attn, tokens)
        own[f"blocks.{index}.attn.prefix.keys"] = block.attn.prefix.keys
        own[f"blocks.{index}.attn.prefix.values"] = block.attn.prefix.values
    return model, own


ADDED = {
    "adaptformer": adaptformer,
    "houlsby": houlsby,
    "repadapter": repadapter,
    "diffit": diffit,
    "convpass": convpass,
    "prefix": prefix,
}
