"""The reference: one client after another in ordinary PyTorch, knowing nothing of the package under test.

Every method is written the way its paper reads, on `nn.Parameter`s, and trained by `torch.optim`. Slow and obvious on
purpose: where a fast result and this one differ, this one is right.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .plain_added import ADDED
from .plain_reparameterized import MIXERS, REPARAMETERIZED


@dataclass
class Plain:
    """A model and its trainable parameters, by the names they are sent under."""

    model: nn.Module
    trainable: dict[str, nn.Parameter]

    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        assert set(values) == set(self.trainable)
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                assert parameter.shape == values[name].shape
                parameter.copy_(values[name])

    def values(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.trainable.items()}


class PlainAdapter(nn.Module):
    def __init__(self, width: int, bottleneck: int):
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return y + self.up(F.gelu(self.down(y)))


class PlainPromptedVit(nn.Module):
    """A ViT's own forward pass, written out, with prompts put in after the prefix tokens and taken out again."""

    def __init__(self, vit: nn.Module, tokens: int, deep: bool, dropout: float):
        super().__init__()
        self.vit, self.deep = vit, deep
        count = len(vit.blocks) if deep else 1
        self.prompts = nn.ParameterList([nn.Parameter(torch.zeros(tokens, vit.embed_dim)) for _ in range(count)])
        self.dropouts = nn.ModuleList([nn.Dropout(dropout) for _ in range(count)])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        vit, prefix, tokens = self.vit, self.vit.num_prefix_tokens, self.prompts[0].shape[0]
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        for i, block in enumerate(vit.blocks):
            if self.deep or i == 0:
                prompt = self.dropouts[i](self.prompts[i].expand(len(x), -1, -1))
                x = torch.cat([x[:, :prefix], prompt, x[:, prefix:]], dim=1)
            x = block(x)
            if self.deep or i == len(vit.blocks) - 1:
                x = torch.cat([x[:, :prefix], x[:, prefix + tokens :]], dim=1)
        return vit.forward_head(vit.norm(x))


def make_plain(model: nn.Module, method: Mapping[str, Any], heads: Sequence[str]) -> Plain:
    """A copy of a timm model, trained by a method.

    It is in eval mode: dropout and drop-path do nothing unless a test puts something in their place.

    Args:
        method: `name` and the method's own settings, all of them given.
        heads: names of the classifier layers, which every method trains.
    """
    settings = dict(method)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "attention_bias_cache"):
            module.training = True  # else it keeps the biases of the first step, as for inference
    head = {name: p for name, p in model.named_parameters() if name.rpartition(".")[0] in heads}
    assert {name.rpartition(".")[0] for name in head} == set(heads)
    outer, own = {
        "full": _full,
        "head": _head,
        "bias": _bias,
        "norm": _norm,
        "prompt": _prompt,
        "adapter": _adapter,
        "partial": _partial,
        **ADDED,
        **REPARAMETERIZED,
    }[settings.pop("name")](model, **settings)
    trainable = {**own, **head}
    for parameter in trainable.values():
        parameter.requires_grad_(True)
    return Plain(outer, trainable)


def _full(model: nn.Module) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    return model, dict(model.named_parameters())


def _head(model: nn.Module) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    return model, {}


def _bias(model: nn.Module) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    return model, {name: p for name, p in model.named_parameters() if name.split(".")[-1] == "bias"}


def _norm(model: nn.Module) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    norms = {name for name, module in model.named_modules() if "Norm" in type(module).__name__}
    norms -= {name for name, module in model.named_modules() if list(module.children())}
    return model, {name: p for name, p in model.named_parameters() if name.rpartition(".")[0] in norms}


def _prompt(model: nn.Module, tokens: int, depth: str, dropout: float) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    prompted = PlainPromptedVit(model, tokens, depth == "deep", dropout)
    return prompted, {f"blocks.{i}.prompt": prompt for i, prompt in enumerate(prompted.prompts)}


def _adapter(model: nn.Module, bottleneck: int, shared: bool) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    mlps = [m.mlp for m in list(model.modules()) if hasattr(m, "mlp") and any(hasattr(m, name) for name in MIXERS)]
    mlps = [mlp for mlp in mlps if isinstance(mlp.fc2, nn.Linear)]
    assert mlps
    if shared:
        model.adapter = PlainAdapter(mlps[0].fc2.out_features, bottleneck)
    for mlp in mlps:
        if not shared:
            mlp.adapter = PlainAdapter(mlp.fc2.out_features, bottleneck)
        adapter = model.adapter if shared else mlp.adapter
        mlp.register_forward_hook(lambda _, __, y, adapter=adapter: adapter(y))
    return model, {name: p for name, p in model.named_parameters() if "adapter" in name.split(".")}


def _partial(model: nn.Module, blocks: int) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    last = range(len(model.blocks) - blocks, len(model.blocks))
    own = tuple(f"{name}." for name in ("norm", "fc_norm", "head", *(f"blocks.{index}" for index in last)))
    return model, {name: p for name, p in model.named_parameters() if name.startswith(own)}


def make_optimizer(parameters: Iterable[nn.Parameter], settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    settings = dict(settings)
    if settings.pop("name") == "sgd":
        return torch.optim.SGD(parameters, **settings)
    betas = (settings.pop("beta1"), settings.pop("beta2"))
    return torch.optim.AdamW(parameters, betas=betas, **settings)


@dataclass
class PlainResult:
    delta: dict[str, torch.Tensor]
    """After - before."""
    loss: float
    """Mean cross-entropy over the steps."""
    norms: list[float]
    """The gradient's norm at each step, before clipping; empty if nothing is clipped."""


def train_plain(
    plain: Plain,
    start: Mapping[str, torch.Tensor],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    optimizer_settings: Mapping[str, Any],
    proximal: float = 0.0,
    clip_norm: float | None = None,
) -> PlainResult:
    """One client's local training, from `start`, over batches of (images, labels)."""
    plain.load(start)
    parameters = list(plain.trainable.values())
    anchors = [p.detach().clone() for p in parameters]
    optimizer = make_optimizer(parameters, optimizer_settings)
    losses, norms = [], []
    for images, labels in batches:
        loss = F.cross_entropy(plain.model(images), labels)
        losses.append(loss.item())
        if proximal:
            distance = sum(((p - anchor) ** 2).sum() for p, anchor in zip(parameters, anchors))
            loss = loss + proximal / 2 * distance
        optimizer.zero_grad()
        loss.backward()
        if clip_norm is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, clip_norm).item())
        optimizer.step()
    after = plain.values()
    delta = {name: after[name] - value for name, value in start.items()}
    return PlainResult(delta, math.fsum(losses) / len(losses), norms)
