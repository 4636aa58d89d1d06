"""Patch embeddings as matrix products. Under vmap a convolution is a grouped one, which GPUs compute slowly.

Shapes: R rows, C and E channels, H x W pixels, p x q a patch.
"""

import torch
from torch import nn


class PatchConv2d(nn.Conv2d):
    """A convolution whose kernel is as large as its stride: patches do not overlap, so it is one matrix product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[R, C, H, W] to [R, E, H // p, W // q]. Pixels beyond the last whole patch are left out."""
        p, q = self.kernel_size
        rows, columns = x.shape[-2] // p, x.shape[-1] // q
        x = x[..., : rows * p, : columns * q].unflatten(-1, (columns, q)).unflatten(-3, (rows, p))
        patches = x.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [R, H // p, W // q, C * p * q]
        return self.multiply(patches, self.weight.flatten(1)).permute(0, 3, 1, 2)

    def multiply(self, patches: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[..., C * p * q] times the transposed weight [E, C * p * q], plus the bias."""
        return nn.functional.linear(patches, weight, self.bias)


def multiply_patches(model: nn.Module) -> None:
    """Makes every convolution over patches that do not overlap a matrix product, in place; its tensors stay."""
    for module in model.modules():
        if is_patch_embedding(module):
            module.__class__ = PatchConv2d


def is_patch_embedding(module: nn.Module) -> bool:
    """Whether a module is a convolution over patches that do not overlap."""
    is_plain = type(module) is nn.Conv2d and module.groups == 1 and module.padding in ((0, 0), "valid")
    return is_plain and module.kernel_size == module.stride != (1, 1) and module.dilation == (1, 1)
