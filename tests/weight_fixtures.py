"""Weights that no fresh model has, so that a test sees which weights were loaded."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def with_changed_tensors(model: nn.Module) -> nn.Module:
    """The same model, after a change of every parameter and buffer."""
    generator = torch.Generator().manual_seed(5)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.1)
    return model
