"""The methods in plain PyTorch, for one client on a plain ViT, as one would write them from their papers.

METHODS maps a method to a function that puts it into a model. The functions take the settings of the config's section
`method`, with the same defaults. What they make trainable has the package's names on the wire.

The file needs PyTorch and timm alone, so that the peers' environments can use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import bare_modules as modules
import torch
from torch import nn
from torch.nn import functional

ALL = ("qkv", "proj", "fc1", "fc2")
"""The linear layers of a block."""


def attach(model: nn.Module, method: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    """Puts a method into a plain ViT, in place, and returns the trained parameters by their names on the wire."""
    settings = dict(method)
    model.requires_grad_(False)
    METHODS[settings.pop("name")](model, **settings)
    model.head.requires_grad_()
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def train(model: nn.Module, chosen: Callable[[str], bool]) -> None:
    """Makes the model's own parameters trainable, by their names."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name))


def replace(model: nn.Module, targets: Sequence[str], make: Callable[[nn.Linear], nn.Module]) -> None:
    """Puts another layer in the place of each block's linear layers of these names."""
    for name, layer in list(model.blocks.named_modules()):
        if isinstance(layer, nn.Linear) and name.endswith(tuple(targets)):
            model.blocks.set_submodule(name, make(layer))


def branches(model: nn.Module) -> Iterator[nn.Module]:
    for block in model.blocks:
        yield from (block.attn, block.mlp)


def add_after(layer: nn.Module, module: nn.Module) -> None:
    layer.register_forward_hook(lambda _, __, y: y + module(y))


def add_beside(layer: nn.Module, module: nn.Module) -> None:
    layer.register_forward_hook(lambda _, inputs, y: y + module(inputs[0]))


def partial_blocks(model: nn.Module, blocks: int = 1) -> None:
    count = len(model.blocks)
    train(model, lambda name: name.startswith(("norm.", *(f"blocks.{n}." for n in range(count - blocks, count)))))


def adapter(model: nn.Module, bottleneck: int = 96) -> None:
    model.adapter = modules.Bottleneck(model.embed_dim, bottleneck, functional.gelu)
    for block in model.blocks:
        add_after(block.mlp, model.adapter)


def houlsby(model: nn.Module, bottleneck: int = 64) -> None:
    for branch in branches(model):
        branch.adapter = modules.Bottleneck(model.embed_dim, bottleneck, functional.gelu)
        add_after(branch, branch.adapter)


def adaptformer(model: nn.Module, bottleneck: int = 64, scale: float = 0.1) -> None:
    for block in model.blocks:
        block.mlp.adapter = modules.Bottleneck(model.embed_dim, bottleneck, functional.relu, scale)
        add_beside(block.mlp, block.mlp.adapter)


def convpass(model: nn.Module, bottleneck: int = 8, scale: float = 1.0) -> None:
    for branch in branches(model):
        branch.convpass = modules.Bypass(model.embed_dim, bottleneck, scale, model.patch_embed.grid_size)
        add_beside(branch, branch.convpass)


def repadapter(model: nn.Module, bottleneck: int = 8, groups: int = 2, scale: float = 1.0) -> None:
    replace(model, ("qkv", "fc1"), lambda linear: modules.RepAdapted(linear, bottleneck, groups, scale))


def diffit(model: nn.Module) -> None:
    train(model, lambda name: name.endswith(".bias") or "norm" in name)
    for branch in branches(model):
        linear = branch.proj if hasattr(branch, "proj") else branch.fc2
        linear.gamma = nn.Parameter(torch.ones(linear.out_features))
        linear.register_forward_hook(lambda linear, _, y: y * linear.gamma.to(y.dtype))


def prefix(model: nn.Module, tokens: int = 10) -> None:
    for block in model.blocks:
        block.attn = modules.PrefixAttention(block.attn, tokens)


def prompt(model: nn.Module, tokens: int = 10, dropout: float = 0.1) -> None:
    model.blocks = nn.Sequential(*(modules.Prompted(block, tokens, model.embed_dim, dropout) for block in model.blocks))


def ssf(model: nn.Module) -> None:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.LayerNorm) and name != "head":
            model.set_submodule(name, modules.Ssf(layer))


def ia3(model: nn.Module) -> None:
    replace(model, ("qkv",), modules.Ia3Qkv)
    replace(model, ("fc2",), modules.Ia3Fc2)


def lora(model: nn.Module, rank: int = 8, alpha: float = 16.0, targets: Sequence[str] = ("qkv",)) -> None:
    replace(model, targets, lambda linear: modules.Lora(linear, rank, alpha))


def dora(model: nn.Module, rank: int = 8, alpha: float = 16.0, targets: Sequence[str] = ("qkv",)) -> None:
    replace(model, targets, lambda linear: modules.Dora(linear, rank, alpha))


def vera(model: nn.Module, rank: int = 256, initial: float = 0.1, projection_seed: int = 0) -> None:
    """The frozen matrices are drawn as in Hugging Face peft, as large as the largest layers of a block need."""
    size, generator = model.blocks[0].mlp.fc1.out_features, torch.Generator().manual_seed(projection_seed)
    shapes = (rank, size), (size, rank)
    a, b = (nn.init.kaiming_uniform_(torch.empty(shape), generator=generator) for shape in shapes)
    replace(model, ALL, lambda linear: modules.Vera(linear, a, b, initial))


def fact(model: nn.Module, rank: int, scale: float = 1.0, has_core: bool = False) -> None:
    width = model.embed_dim
    model.fact = nn.ParameterDict({"u": torch.zeros(rank, width), "v": torch.zeros(width, rank)})
    if has_core:
        model.fact["core"] = torch.zeros(rank, rank, rank)
    replace(model, ALL, lambda linear: modules.Fact(linear, model.fact, (rank,) if has_core else (rank, rank), scale))


METHODS: dict[str, Callable[..., None]] = {
    "full": lambda model: train(model, lambda name: True),
    "head": lambda model: None,
    "bias": lambda model: train(model, lambda name: name.endswith(".bias")),
    "norm": lambda model: train(model, lambda name: "norm" in name),
    "partial": partial_blocks,
    "prompt": prompt,
    "adapter": adapter,
    "lora": lora,
    "adaptformer": adaptformer,
    "houlsby": houlsby,
    "repadapter": repadapter,
    "diffit": diffit,
    "convpass": convpass,
    "prefix": prefix,
    "ssf": ssf,
    "ia3": ia3,
    "dora": dora,
    "vera": vera,
    "fact_tt": partial(fact, rank=16),
    "fact_tk": partial(fact, rank=32, has_core=True),
}
