"""Attention over few tokens on the CPU, where PyTorch's fused kernel is slower than the plain products and softmax."""

import torch
from torch import nn

FEW_TOKENS = {torch.float32: 40, torch.bfloat16: 256}
"""The most tokens at which the plain computation is faster, by the type of the computation."""


def use_plain_attention(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Makes a model's attention layers compute plainly where a sequence is short; timm's flag `fused_attn` decides."""
    limit = FEW_TOKENS.get(compute_dtype, 0)

    def choose(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        layer.fused_attn = inputs[0].dim() != 3 or inputs[0].shape[1] > limit

    for module in model.modules():
        if getattr(module, "fused_attn", False):
            module.register_forward_pre_hook(choose)
