"""The modules of the methods in plain PyTorch, for one client, as one would write them from the papers.

Shapes: B batch, T tokens, D width, H bottleneck, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional


class Bottleneck(nn.Module):
    """scale * up(activation(down(x)))."""

    def __init__(self, width: int, inner: int, activation: Callable[[torch.Tensor], torch.Tensor], scale: float = 1.0):
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        self.activation, self.scale = activation, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(self.activation(self.down(x)))
        return y if self.scale == 1.0 else y * self.scale


class Lora(nn.Module):
    """A frozen linear layer with a low-rank update beside it."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.lora_A.weight.T * self.scale) @ self.lora_B.weight.T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.update(x)


class Dora(Lora):
    """LoRA, whose outputs are divided by the norms of the changed weight and get a magnitude."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__(linear, rank, alpha)
        self.lora_magnitude_vector = nn.Parameter(linear.weight.norm(dim=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            changed = self.linear.weight + self.scale * self.lora_B.weight @ self.lora_A.weight
            norms = changed.norm(dim=1)
        y = functional.linear(x, self.linear.weight) + self.update(x)
        return y * (self.lora_magnitude_vector / norms).to(y.dtype) + self.linear.bias


class Vera(nn.Module):
    """A frozen linear layer beside a frozen random path with scales of its own."""

    def __init__(self, linear: nn.Linear, a: torch.Tensor, b: torch.Tensor, initial: float):
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(a[:, : linear.in_features], requires_grad=False)
        self.b = nn.Parameter(b[: linear.out_features], requires_grad=False)
        self.vera_lambda_d = nn.Parameter(torch.full((len(a),), initial))
        self.vera_lambda_b = nn.Parameter(torch.zeros(linear.out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = functional.linear(x, self.a)
        update = functional.linear(hidden * self.vera_lambda_d.to(hidden.dtype), self.b)
        return self.linear(x) + update * self.vera_lambda_b.to(update.dtype)


class Fact(nn.Module):
    """A linear layer beside its path through the factors that all layers share."""

    def __init__(self, linear: nn.Linear, factors: nn.ParameterDict, size: Sequence[int], scale: float):
        super().__init__()
        self.linear, self.factors, self.scale = linear, (factors,), scale  # the factors are the model's children
        self.width, self.outputs = len(factors["v"]), linear.out_features // len(factors["v"])
        self.fact_pieces = nn.Parameter(torch.zeros(linear.weight.numel() // self.width**2, *size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (factors,), pieces = self.factors, self.fact_pieces
        if "core" in factors:
            pieces = torch.einsum("nk,kab->nab", pieces, factors["core"])
        hidden = functional.linear(x.unflatten(-1, (-1, self.width)), factors["u"])
        hidden = torch.einsum("...ib,eiab->...ea", hidden, pieces.unflatten(0, (self.outputs, -1)))
        return self.linear(x) + functional.linear(hidden * self.scale, factors["v"]).flatten(-2)


class Ssf(nn.Module):
    """A frozen layer with a scale and a shift after it."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.shape = layer, (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
        self.ssf_scale = nn.Parameter(torch.ones(len(layer.weight)))
        self.ssf_shift = nn.Parameter(torch.zeros(len(layer.weight)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        scale, shift = (own.to(y.dtype).view(self.shape) for own in (self.ssf_scale, self.ssf_shift))
        return y * scale + shift


class Ia3Qkv(nn.Module):
    """A frozen layer whose keys and values are scaled."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear
        self.ia3_k, self.ia3_v = (nn.Parameter(torch.ones(linear.out_features // 3)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.linear(x).chunk(3, dim=-1)
        return torch.cat([q, k * self.ia3_k.to(k.dtype), v * self.ia3_v.to(v.dtype)], dim=-1)


class Ia3Fc2(nn.Module):
    """A frozen layer whose inputs are scaled."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear, self.ia3_fc2 = linear, nn.Parameter(torch.ones(linear.in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x * self.ia3_fc2.to(x.dtype))


class RepAdapted(nn.Module):
    """A frozen linear layer behind a linear adapter, whose second projection is a grouped convolution."""

    def __init__(self, linear: nn.Linear, inner: int, groups: int, scale: float):
        super().__init__()
        self.linear, self.groups, self.scale, width = linear, groups, scale, linear.in_features
        down, up = torch.zeros(inner, width), torch.zeros(groups, width // groups, inner // groups)
        self.adapter = nn.ParameterDict({"down": nn.Parameter(down), "up": nn.Parameter(up)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, up = functional.linear(x, self.adapter["down"]), self.adapter["up"].flatten(0, 1).unsqueeze(-1)
        change = functional.conv1d(hidden.mT, up, groups=self.groups).mT
        return self.linear(x + (change if self.scale == 1.0 else change * self.scale))


class Bypass(nn.Module):
    """scale * up(gelu(conv(gelu(down(x))))), over the patches as an image, and each token before them as another."""

    def __init__(self, width: int, inner: int, scale: float, grid: tuple[int, int]):
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        self.conv, self.scale, self.grid = nn.Conv2d(inner, inner, 3, padding=1), scale, grid

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = functional.gelu(self.down(x)).mT
        alone = x.shape[1] - self.grid[0] * self.grid[1]
        images = [hidden[..., token : token + 1].unsqueeze(-1) for token in range(alone)]
        images.append(hidden[..., alone:].unflatten(2, self.grid))
        hidden = torch.cat([self.conv(image).flatten(2) for image in images], dim=2).mT
        y = self.up(functional.gelu(hidden))
        return y if self.scale == 1.0 else y * self.scale


class PrefixAttention(nn.Module):
    """A ViT's attention, written out, with learned keys and values in front of the image's own."""

    def __init__(self, attn: nn.Module, tokens: int):
        super().__init__()
        self.attn, self.prefix = attn, nn.Module()
        for kind in ("keys", "values"):
            self.prefix.register_parameter(kind, nn.Parameter(torch.zeros(tokens, attn.qkv.in_features)))

    def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
        heads = self.attn.num_heads
        q, k, v = self.attn.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        keys, values = (
            own.to(q.dtype).unflatten(-1, (heads, -1)).transpose(0, 1).expand(len(x), -1, -1, -1)
            for own in (self.prefix.keys, self.prefix.values)
        )
        k, v = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        return self.attn.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Prompted(nn.Module):
    """A block with learned tokens after the class token."""

    def __init__(self, block: nn.Module, tokens: int, width: int, dropout: float):
        super().__init__()
        self.block, self.dropout = block, dropout
        self.prompt = nn.Parameter(torch.zeros(tokens, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = functional.dropout(self.prompt.expand(len(x), -1, -1), self.dropout)
        y = self.block(torch.cat([x[:, :1], tokens, x[:, 1:]], dim=1))
        return torch.cat([y[:, :1], y[:, 1 + tokens.shape[1] :]], dim=1)
