"""Methods that change or re-parameterise frozen layers, in ordinary PyTorch: part of the reference in plain.py.

Each function changes a model in place and returns it with its trainable parameters, by the names they are sent under.

Shapes: B batch, T tokens, D width, E outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from fedpeft_dist.backbones.timm_backbone import classifier_names

MIXERS = ("attn", "xca", "token_mixer", "factoratt_crpe", "conv_dw")
"""Names of the layers before the MLP in the blocks of timm's families."""
PARTS = ("q", "k", "v")

Built = tuple[nn.Module, dict[str, nn.Parameter]]


class PlainLora(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout: float):
        super().__init__()
        self.linear = linear
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False)
        self.scale = scale

    @property
    def weight(self) -> torch.Tensor:
        """The merged weight, which some attentions read in place of calling the layer. It knows no dropout."""
        assert not self.dropout.p
        return self.linear.weight + self.scale * self.lora_B.weight @ self.lora_A.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.scale * self.lora_B(self.lora_A(self.dropout(x)))


class PlainPart(nn.Module):
    """The low-rank update of one third of a layer's outputs."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, linear.out_features // 3, bias=False)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.lora_B(self.lora_A(x))


class PlainPartsLora(nn.Module):
    """A fused layer, cut into its thirds, each of which may have an update."""

    def __init__(self, linear: nn.Linear, dropout: float, parts: Mapping[str, PlainPart]):
        super().__init__()
        self.linear, self.dropout = linear, nn.Dropout(dropout)
        for name, part in parts.items():
            setattr(self, name, part)

    @property
    def weight(self) -> torch.Tensor:
        updates = []
        for name, weight in zip(PARTS, self.linear.weight.chunk(3)):
            part = getattr(self, name, None)
            updates.append(weight + part.scale * part.lora_B.weight @ part.lora_A.weight if part else weight)
        return torch.cat(updates)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        thirds = self.linear(x).chunk(3, dim=-1)
        x = self.dropout(x)
        return torch.cat(
            [y + getattr(self, name)(x) if hasattr(self, name) else y for name, y in zip(PARTS, thirds)], -1
        )


class PlainSsf(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.ssf_scale = nn.Parameter(torch.ones(len(layer.weight)))
        if layer.bias is not None:
            self.ssf_shift = nn.Parameter(torch.zeros(len(layer.weight)))
        self.shape = (-1, 1, 1) if "2d" in type(layer).__name__ else (-1,)

    @property
    def weight(self) -> torch.Tensor:
        return self.layer.weight * self.ssf_scale[:, None]

    @property
    def kernel_size(self) -> tuple[int, int]:
        return self.layer.kernel_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x) * self.ssf_scale.view(self.shape)
        return y + self.ssf_shift.view(self.shape) if hasattr(self, "ssf_shift") else y


class PlainIa3Qkv(nn.Module):
    def __init__(self, linear: nn.Linear, targets: Sequence[str]):
        super().__init__()
        self.linear = linear
        for target in targets:
            setattr(self, f"ia3_{target}", nn.Parameter(torch.ones(linear.out_features // 3)))

    def thirds(self, whole: torch.Tensor, dim: int, shape: tuple[int, ...]) -> torch.Tensor:
        own = [getattr(self, f"ia3_{part}", torch.ones(1, dtype=whole.dtype)) for part in PARTS]
        return torch.cat([third * scale.view(shape) for third, scale in zip(whole.chunk(3, dim), own)], dim)

    @property
    def weight(self) -> torch.Tensor:
        return self.thirds(self.linear.weight, 0, (-1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.thirds(self.linear(x), -1, (-1,))


class PlainIa3Mlp(nn.Module):
    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear
        self.ia3_fc2 = nn.Parameter(torch.ones(linear.in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.ia3_fc2 * x)


class PlainDora(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.linear, self.scale = linear, scale
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False)
        self.lora_magnitude_vector = nn.Parameter(linear.weight.norm(dim=1))

    @property
    def weight(self) -> torch.Tensor:
        """m * V / ||V||, with a norm that has no gradient."""
        changed = self.linear.weight + self.scale * self.lora_B.weight @ self.lora_A.weight
        return (self.lora_magnitude_vector / changed.norm(dim=1).detach())[:, None] * changed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.linear.bias)


class PlainVera(nn.Module):
    def __init__(self, linear: nn.Linear, a: torch.Tensor, b: torch.Tensor, initial: float):
        super().__init__()
        self.linear = linear
        self.register_buffer("a", a[:, : linear.in_features])
        self.register_buffer("b", b[: linear.out_features])
        self.vera_lambda_b = nn.Parameter(torch.zeros(linear.out_features))
        self.vera_lambda_d = nn.Parameter(torch.full((len(a),), initial))

    @property
    def weight(self) -> torch.Tensor:
        return self.linear.weight + self.vera_lambda_b.diag() @ self.b @ self.vera_lambda_d.diag() @ self.a

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.linear.bias)


class PlainFact(nn.Module):
    """A layer whose weight gets one update for each of its pieces of D x D."""

    def __init__(self, linear: nn.Linear, fact: nn.Module, size: tuple[int, ...], scale: float):
        super().__init__()
        self.linear, self.scale = linear, scale
        self.fact = [fact]  # no child of this module
        self.fact_pieces = nn.Parameter(torch.zeros(linear.weight.numel() // len(fact.v) ** 2, *size))

    @property
    def weight(self) -> torch.Tensor:
        fact, (outputs, inputs) = self.fact[0], self.linear.weight.shape
        pieces = iter(self.fact_pieces)
        rows = []
        for _ in range(outputs // len(fact.v)):
            row = []
            for _ in range(inputs // len(fact.v)):
                own = next(pieces)
                middle = sum(p * c for p, c in zip(own, fact.core)) if hasattr(fact, "core") else own
                row.append(fact.v @ middle @ fact.u)
            rows.append(torch.cat(row, dim=1))
        return self.linear.weight + self.scale * torch.cat(rows)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.linear.bias)


def lora(
    model: nn.Module,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    dropout: float,
    rslora: bool = False,
    ranks: Mapping[str, int] = {},
) -> Built:
    def numbers(target: str) -> tuple[int, float]:
        own = ranks.get(target, rank)
        return own, alpha / (own**0.5 if rslora else own)

    for target in targets:
        if target not in PARTS:
            replace(model, target, lambda linear, target=target: PlainLora(linear, *numbers(target), dropout))
    parts = [target for target in targets if target in PARTS]
    if parts:
        replace(
            model,
            "qkv",
            lambda linear: PlainPartsLora(linear, dropout, {p: PlainPart(linear, *numbers(p)) for p in parts}),
        )
    return model, named(model, "lora_")


TABLES = ("cpb_mlp", "rel_pos.mlp", "meta_mlp", "token_projection")
"""Parts of the names of layers that compute a table for all samples. They stay frozen."""


def ssf(model: nn.Module) -> Built:
    classifiers = classifier_names(model)
    for name, layer in list(model.named_modules()):
        is_layer = isinstance(layer, nn.Linear | nn.Conv2d) or "Norm" in type(layer).__name__
        is_frozen = name in classifiers or any(table in name for table in TABLES)
        if is_layer and getattr(layer, "weight", None) is not None and not is_frozen:
            model.set_submodule(name, PlainSsf(layer))
    return model, named(model, "ssf_")


def ia3(model: nn.Module, targets: Sequence[str] = ("k", "v", "fc2")) -> Built:
    parts = [target for target in targets if target in PARTS]
    if parts:
        replace(model, "qkv", lambda linear: PlainIa3Qkv(linear, parts))
    if "fc2" in targets:
        replace(model, "fc2", PlainIa3Mlp)
    return model, named(model, "ia3_")


def dora(model: nn.Module, rank: int, alpha: float, targets: Sequence[str]) -> Built:
    for target in targets:
        replace(model, target, lambda linear: PlainDora(linear, rank, alpha / rank))
    return model, named(model, "lora_")


def vera(model: nn.Module, rank: int, targets: Sequence[str], initial: float, projection_seed: int) -> Built:
    """A and B are drawn uniformly with Kaiming's bound, A first, as large as the largest layer needs."""
    layers = []
    for target in targets:
        replace(model, target, lambda linear: layers.append(linear) or linear)
    generator = torch.Generator().manual_seed(projection_seed)
    sizes = max(layer.in_features for layer in layers), max(layer.out_features for layer in layers)
    a, b = (torch.empty(shape) for shape in ((rank, sizes[0]), (sizes[1], rank)))
    for matrix in (a, b):
        bound = (6 / matrix.shape[1]) ** 0.5
        matrix.uniform_(-bound, bound, generator=generator)
    for target in targets:
        replace(model, target, lambda linear: PlainVera(linear, a, b, initial))
    return model, named(model, "vera_")


def fact(model: nn.Module, rank: int, scale: float, core: bool) -> Built:
    widths = []
    replace(model, "fc1", lambda linear: widths.append(linear.in_features) or linear)
    model.fact = nn.Module()
    model.fact.u = nn.Parameter(torch.zeros(rank, widths[0]))
    model.fact.v = nn.Parameter(torch.zeros(widths[0], rank))
    if core:
        model.fact.core = nn.Parameter(torch.zeros(rank, rank, rank))
    for target in ("qkv", "proj", "fc1", "fc2"):
        replace(model, target, lambda linear: PlainFact(linear, model.fact, (rank,) * (1 if core else 2), scale))
    return model, named(model, "fact")


def replace(model: nn.Module, target: str, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Puts another layer in the target's place, in every block."""
    places = MIXERS if target in ("qkv", "proj") else ("mlp",)
    blocks = [module for module in model.modules() if any(hasattr(module, name) for name in MIXERS)]
    parents = [getattr(block, place) for block in blocks for place in places if hasattr(block, place)]
    parents = [parent for parent in parents if isinstance(getattr(parent, target, None), nn.Linear)]
    assert parents
    for parent in parents:
        setattr(parent, target, make(getattr(parent, target)))


def named(model: nn.Module, mark: str) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if mark in name}


REPARAMETERIZED: dict[str, Callable[..., Built]] = {
    "lora": lora,
    "ssf": ssf,
    "ia3": ia3,
    "dora": dora,
    "vera": vera,
    "fact_tt": partial(fact, core=False),
    "fact_tk": partial(fact, core=True),
}
