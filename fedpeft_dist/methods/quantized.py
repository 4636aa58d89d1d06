"""Puts 8-bit weights in the place of those that a method leaves frozen."""

import torch
from torch import nn

from fedpeft_dist.lanes.quantized import QuantizedLinear
from fedpeft_dist.methods.targets import replace_layer


def quantize_frozen(model: nn.Module, plain: nn.Module, compute_dtype: torch.dtype) -> int:
    """Replaces the linear layers that a method leaves frozen. Trained layers are no `nn.Linear` and stay.

    Args:
        model: with its method.
        plain: the same model before the method changed it, with the same tensors. It gets the same replacements.

    Returns:
        The number of weights that are 8-bit integers now.
    """
    layers = {m.weight: QuantizedLinear.of(m, compute_dtype) for m in model.modules() if type(m) is nn.Linear}
    for changed in (model, plain):
        for name, module in list(changed.named_modules(remove_duplicate=False)):
            if type(module) is nn.Linear and module.weight in layers:
                replace_layer(changed, name, layers[module.weight].with_bias(module.bias))
    return sum(layer.values.numel() for layer in layers.values())
