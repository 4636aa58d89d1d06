"""Puts 8-bit weights in the place of those that a method leaves frozen."""

from dataclasses import dataclass

import torch
from torch import nn

from fedpeft_dist.backbones.deferred import Deferred, made
from fedpeft_dist.lanes.quantized import QuantizedLinear, scale_of, values_of
from fedpeft_dist.methods.targets import replace_layer


@dataclass
class DeferredValues:
    """The 8-bit values of a weight that is itself made later."""

    weight: Deferred
    scale: torch.Tensor

    def make(self) -> torch.Tensor:
        """int8 [E, D], on the CPU."""
        return values_of(self.weight.make(), self.scale)


def quantize_frozen(model: nn.Module, plain: nn.Module, compute_dtype: torch.dtype) -> int:
    """Replaces the linear layers that a method leaves frozen. Trained layers are no `nn.Linear` and stay.

    A deferred weight is made once for its scale, and again for its values when they are asked for.

    Args:
        model: with its method.
        plain: the same model before the method changed it, with the same tensors. It gets the same replacements.

    Returns:
        The number of weights that are 8-bit integers now.
    """
    layers = {m.weight: _quantized(m, compute_dtype) for m in model.modules() if type(m) is nn.Linear}
    for changed in (model, plain):
        for name, module in list(changed.named_modules(remove_duplicate=False)):
            if type(module) is nn.Linear and module.weight in layers:
                replace_layer(changed, name, layers[module.weight].with_bias(module.bias))
    return sum(layer.values.numel() for layer in layers.values())


def _quantized(linear: nn.Linear, compute_dtype: torch.dtype) -> QuantizedLinear:
    own = getattr(linear.weight, "deferred", None)
    if own is None:
        return QuantizedLinear.of(linear, compute_dtype)
    scale = scale_of(made(linear.weight), compute_dtype)
    values = nn.Parameter(torch.empty_like(linear.weight, dtype=torch.int8, requires_grad=False), False)
    values.deferred = DeferredValues(own, scale)
    return QuantizedLinear(values, nn.Parameter(scale, False), linear.bias)
