"""Frozen linear layers whose weights are kept as 8-bit integers, with one scale for each output channel.

    weight[e, d] = scale[e] * values[e, d],    scale[e] = max_d |w[e, d]| / 127,    values = round(w / scale)

This is symmetric quantisation per channel (Krishnamoorthi 2018, arXiv 1806.08342, section 2). Each forward and each
backward pass makes the weight anew in the compute type, so no pass leaves a tensor of the weight's size behind. A
library's 8-bit tensors would keep one for each layer until the backward pass.

Shapes: R rows, D inputs, E outputs.
"""

import torch
from torch import nn

from fedpeft_dist.lanes.onednn import onednn_product

LARGEST = 127


class QuantizedLinear(nn.Linear):
    """A linear layer with a frozen 8-bit weight; [R, ..., D] to [R, ..., E].

    Args:
        values: int8 [E, D].
        scale: [E], in the type of the computation.
        bias: [E], or None.
    """

    def __init__(self, values: nn.Parameter, scale: nn.Parameter, bias: nn.Parameter | None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = values.shape
        self.values, self.scale, self.bias, self.use_onednn = values, scale, bias, False

    @classmethod
    def of(cls, linear: nn.Linear, compute_dtype: torch.dtype) -> "QuantizedLinear":
        """The layer with rounded weights."""
        scale = scale_of(linear.weight, compute_dtype)
        values = values_of(linear.weight, scale)
        return cls(nn.Parameter(values, False), nn.Parameter(scale, False), linear.bias)

    def with_bias(self, bias: nn.Parameter | None) -> "QuantizedLinear":
        """A layer that shares the weight of this one."""
        return QuantizedLinear(self.values, self.scale, bias)

    @property
    def weight(self) -> torch.Tensor:
        """The weight in the type of the computation, [E, D], for models that read it by themselves."""
        return self.values * self.scale.unsqueeze(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.scale.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        # A model may add to the result in place, which autograd forbids where the product has more than two axes.
        rows = x.to(dtype).flatten(0, -2)
        return QuantizedProduct.apply(rows, self.values, self.scale, bias, self.use_onednn).view(*x.shape[:-1], -1)


@torch.no_grad()
def scale_of(weight: torch.Tensor, compute_dtype: torch.dtype) -> torch.Tensor:
    """The scale [E] of a weight [E, D], rounded to the type of the computation. A channel of zeros has scale 1."""
    scale = (weight.float().abs().amax(dim=1) / LARGEST).to(compute_dtype)
    return torch.where(scale > 0, scale, 1.0)


@torch.no_grad()
def values_of(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The int8 values [E, D] of a weight. They follow its rounded scale, and so make up for that rounding."""
    return (weight.float() / scale.float().unsqueeze(1)).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)


class QuantizedProduct(torch.autograd.Function):
    """x [R, D] times the transposed weight, values [E, D] * scale [E], plus the bias [E]."""

    @staticmethod
    def forward(
        ctx, x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, onednn: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(values, scale)
        ctx.product = onednn_product if onednn else nn.functional.linear
        return ctx.product(x, values * scale.unsqueeze(1), bias)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, scale = ctx.saved_tensors
        to_x = ctx.product(grad, (values * scale.unsqueeze(1)).t()) if ctx.needs_input_grad[0] else None
        to_bias = grad.sum(dim=0) if ctx.needs_input_grad[3] else None
        return to_x, None, None, to_bias, None
