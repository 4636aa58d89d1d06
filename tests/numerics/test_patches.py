"""A patch embedding as a matrix product agrees with the convolution, alone and under vmap."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fedpeft_dist.lanes.patches import PatchConv2d, multiply_patches
from fedpeft_dist.methods.lane_model import VmapLaneModel

from .cases import METHODS, VIT, make_lane_model, make_model


def both(convolution: nn.Conv2d) -> tuple[nn.Conv2d, nn.Conv2d]:
    product = copy.deepcopy(convolution)
    multiply_patches(nn.Sequential(product))
    assert type(product) is PatchConv2d
    return convolution.double(), product.double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("patch", "size"), [(4, (16, 16)), ((4, 2), (12, 10)), (5, (17, 13))])
def test_agrees_with_the_convolution(patch, size, bias):
    torch.manual_seed(0)
    convolution, product = both(nn.Conv2d(3, 8, patch, stride=patch, bias=bias))
    results = []
    for layer in (convolution, product):
        x = torch.randn(6, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = layer(x)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters())])
    for actual, expected in zip(*results[::-1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_agrees_with_the_convolution_for_each_lane_under_vmap():
    torch.manual_seed(0)
    convolution, product = both(nn.Conv2d(3, 8, 4, stride=4))
    weights = {"weight": torch.randn(5, 8, 3, 4, 4), "bias": torch.randn(5, 8)}
    weights = {name: value.double() for name, value in weights.items()}
    images = torch.randn(5, 2, 3, 16, 16).double()
    own = torch.vmap(lambda values, x: torch.func.functional_call(product, values, (x,)))(weights, images)
    for lane in range(5):
        mine = {name: value[lane] for name, value in weights.items()}
        expected = torch.func.functional_call(convolution, mine, (images[lane],))
        torch.testing.assert_close(own[lane], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv2d(3, 8, 4, stride=2),
        nn.Conv2d(3, 8, 4, stride=4, padding=1),
        nn.Conv2d(4, 8, 4, stride=4, groups=2),
        nn.Conv2d(3, 8, 2, stride=2, dilation=2),
        nn.Conv2d(3, 8, 1),
    ],
    ids=str,
)
def test_leaves_other_convolutions_alone(other):
    multiply_patches(nn.Sequential(other))
    assert type(other) is nn.Conv2d


def test_full_fine_tuning_multiplies_and_the_plain_backbone_convolves():
    model = make_lane_model(make_model(*VIT), METHODS["full"])
    assert isinstance(model, VmapLaneModel)
    assert type(model.backbone.model.patch_embed.proj) is PatchConv2d
    assert type(model.backbone.plain.patch_embed.proj) is nn.Conv2d
