"""The only functions that know a lane axis. All other code sees an ordinary batch of L * B rows.

Rows are lane-major: row l * B + b is sample b of lane l. The first axis of a trainable tensor is the lanes.

Shapes: L lanes, B batch, R = L * B rows, D and E channels.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from timm.layers import activations
from torch import nn

from fedpeft_dist.lanes.parameters import ALIGNMENT

# The CPU kernels of these activations use another formula for a tensor's last elements. So does the kernel of the GELU
# that is approximated by tanh.
PLACE_ROUNDING = (
    nn.SiLU, nn.Sigmoid, nn.LogSigmoid, nn.Mish, nn.Softplus,
    activations.Swish, activations.Sigmoid, activations.Mish, activations.GELUTanh, activations.QuickGELU,
)  # fmt: skip


def lane_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Each lane's own linear layer, as one batched matrix product.

    Args:
        x: [R, ..., D].
        weight: [L, E, D].
        bias: [L, E] or None.

    Returns:
        [R, ..., E].
    """
    num_lanes, out_features, in_features = weight.shape
    rows = x.reshape(num_lanes, -1, in_features)
    y = torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)
    return y.view(*x.shape[:-1], out_features)


def lane_bias(x: torch.Tensor, bias: torch.Tensor, channel_dim: int = -1) -> torch.Tensor:
    """Adds each lane's own bias [L, D] to rows [R, ...] that have D channels at `channel_dim`."""
    if channel_dim == -1:
        return _Bias.apply(x, bias.to(x.dtype))
    return (x.unflatten(0, (len(bias), -1)) + _over_channels(x, bias, channel_dim)).flatten(0, 1)


def lane_affine(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, channel_dim: int = -1) -> torch.Tensor:
    """x * scale + bias with each lane's own scale and bias, both [L, D]; x as in `lane_bias`."""
    if channel_dim == -1:
        return _Affine.apply(x, scale.to(x.dtype), bias.to(x.dtype))
    scale, bias = (_over_channels(x, t, channel_dim) for t in (scale, bias))
    return torch.addcmul(bias, x.unflatten(0, (len(scale), -1)), scale).flatten(0, 1)


class _Bias(torch.autograd.Function):
    """x + bias. Autograd's own backward pass sums over the rows with a kernel that needs its memory cleared first."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.num_lanes = len(bias)
        return (by_lane(x, len(bias)) + bias.unsqueeze(1)).view(x.shape)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad, sum_rows(by_lane(grad, ctx.num_lanes))


class _Affine(torch.autograd.Function):
    """x * scale + bias. Autograd's own backward pass multiplies each factor by one more, and sums as for `_Bias`."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, scale)
        return torch.addcmul(bias.unsqueeze(1), by_lane(x, len(scale)), scale.unsqueeze(1)).view(x.shape)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        x, scale = ctx.saved_tensors
        own = by_lane(grad, len(scale))
        to_scale = sum_rows(own * by_lane(x, len(scale)))
        return (own * scale.unsqueeze(1)).view(grad.shape), to_scale, sum_rows(own) if ctx.needs_input_grad[2] else None


def by_lane(x: torch.Tensor, num_lanes: int) -> torch.Tensor:
    """Rows [R, ..., D] as [L, rows of a lane, D]."""
    return x.reshape(num_lanes, -1, x.shape[-1])


def sum_rows(x: torch.Tensor) -> torch.Tensor:
    """[L, rows, D] summed over its rows: [L, D]. A product with ones is one kernel and needs no cleared memory."""
    if torch.compiler.is_compiling():  # there a sum joins the operations around it
        return x.sum(dim=1)
    ones = _ones(x.shape[1], x.dtype, x.device)
    return torch.bmm(ones.expand(len(x), 1, -1), x).squeeze(1)


@lru_cache(maxsize=16)
def _ones(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.ones(1, 1, size, dtype=dtype, device=device)


def lane_scale(x: torch.Tensor, scale: torch.Tensor, channel_dim: int = -1) -> torch.Tensor:
    """Multiplies rows [R, ...] that have D channels at `channel_dim` by each lane's own scale [L, D]."""
    return (x.unflatten(0, (len(scale), -1)) * _over_channels(x, scale, channel_dim)).flatten(0, 1)


def lane_tokens(tokens: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Each lane's own tokens [L, T, D], repeated for each of its samples: [R, T, D]."""
    return tokens.unsqueeze(1).expand(-1, num_rows // len(tokens), -1, -1).flatten(0, 1)


def lane_aligned(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, num_lanes: int) -> torch.Tensor:
    """An elementwise function of rows [R, ...], with each lane padded to a multiple of ALIGNMENT elements.

    Elementwise kernels may round differently in their vectorised body and their tail (see lanes/parameters.py).
    """
    size = x.numel() // num_lanes
    is_exported = isinstance(size, torch.SymInt)  # the batch size is open, and a program has no lanes to align
    padding = 0 if is_exported else -size % ALIGNMENT
    if padding == 0:
        return function(x)
    lanes = nn.functional.pad(x.reshape(num_lanes, size), (0, padding))
    return function(lanes)[:, :size].reshape(x.shape)


class AlignedActivation(nn.Module):
    """Pads the input of an activation, so that the rounding of an element does not depend on its place."""

    def __init__(self, activation: nn.Module):
        super().__init__()
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return lane_aligned(self.activation, x, num_lanes=1)


def align_activations(model: nn.Module) -> None:
    """Wraps the frozen activations whose rounding depends on an element's place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PLACE_ROUNDING) or getattr(module, "approximate", None) == "tanh":
            model.set_submodule(name, AlignedActivation(module))


def _over_channels(x: torch.Tensor, per_lane: torch.Tensor, channel_dim: int) -> torch.Tensor:
    """[L, D] in x's type, shaped to broadcast over x unfolded to [L, B, ...]."""
    shape = [len(per_lane), *[1] * x.dim()]
    shape[channel_dim if channel_dim < 0 else channel_dim + 1] = per_lane.shape[1]
    return per_lane.to(x.dtype).view(shape)
