"""Methods that add modules, on other models than the plain ViT: equal to plain PyTorch, or refused in one line."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import MethodConfig
from fedpeft_dist.lanes.parameters import LaneParameters
from fedpeft_dist.methods import make_method

from .cases import METHODS, VIT, make_lane_model, make_model, start_vector
from .test_families import FAMILIES, assert_equals_plain_training

ADDED = ("adaptformer", "houlsby", "repadapter", "diffit", "convpass", "prefix")
# DINOv2 has registers and layer scale; DINOv3 has rotary positions and a bias apart from qkv. This ConvNeXt's MLPs are
# linear.
OWN = {
    "convnext": ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}, 32, ["head.fc"]),
    "dinov2": ("vit_small_patch14_reg4_dinov2", VIT[1] | {"depth": 1}, 16, ["head"]),
    "dinov3": (
        "vit_tiny_patch16_dinov3_qkvb",
        {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32},
        32,
        ["head"],
    ),
}
MODELS = FAMILIES | OWN

UNFIT = {
    ("swin", "convpass"): "method.name: 'convpass' needs a grid of patch tokens (",
    ("swin", "prefix"): "method.name: 'prefix' fits timm's VisionTransformer and Eva with one layer qkv a block",
    ("convnext", "houlsby"): "method.name: 'houlsby' needs an attention (",
    ("convnext", "repadapter"): "method.name: 'repadapter' finds no linear layer attn.qkv or ",
    ("convnext", "convpass"): "method.name: 'convpass' needs a grid of patch tokens (",
    ("convnext", "prefix"): "method.name: 'prefix' fits timm's VisionTransformer and Eva",
    ("resnet", "adaptformer"): "method.name: 'adaptformer' finds no blocks with an mlp beside ",
    ("resnet", "diffit"): "method.name: 'diffit' finds no blocks with ",
}
FIT = [
    (family, method) for family in ("deit-distilled", "swin", *OWN) for method in ADDED if (family, method) not in UNFIT
]


@pytest.mark.parametrize(("family", "method"), FIT)
def test_lanes_end_where_plain_training_ends(family, method):
    name, arguments, image_size, heads = MODELS[family]
    assert_equals_plain_training(make_model(name, arguments), METHODS[method], image_size, heads)


@pytest.mark.parametrize(("family", "method"), UNFIT)
def test_a_misfit_is_refused_in_one_line(family, method):
    name, arguments, image_size, _ = MODELS[family]
    with pytest.raises(ConfigError) as caught:
        make_lane_model(make_model(name, arguments), METHODS[method], image_size)
    assert str(caught.value).startswith(UNFIT[family, method])
    assert "\n" not in str(caught.value)


def test_the_models_have_registers_layer_scale_and_biases_apart():
    dinov2, dinov3 = (make_model(*MODELS[family][:2]) for family in ("dinov2", "dinov3"))
    assert dinov2.num_prefix_tokens == dinov3.num_prefix_tokens == 5
    assert dinov2.blocks[0].ls1.gamma.numel() == 32
    assert dinov3.blocks[0].attn.q_bias is not None
    assert dinov3.blocks[0].gamma_1 is not None


def test_repadapter_names_the_width_that_groups_do_not_divide():
    with pytest.raises(ConfigError, match=r"^method\.groups: 3 does not divide the width 32 of VisionTransformer$"):
        make_lane_model(make_model(*VIT), {"name": "repadapter", "bottleneck": 6, "groups": 3})


@pytest.mark.parametrize("family", ["vit", "swin", "convnext", "dinov2", "dinov3"])
@pytest.mark.parametrize("method", ["repadapter", "diffit"])
def test_the_merged_backbone_is_the_trained_model(family, method):
    if (family, method) in UNFIT:
        pytest.skip("refused")
    name, arguments, image_size, _ = MODELS.get(family, (*VIT, 16, ["head"]))
    model = make_model(name, arguments)
    lane_model = make_lane_model(model, METHODS[method], image_size, torch.float64)
    model.double()
    vector = start_vector(lane_model, torch.float64)
    images = torch.randn(1, 4, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)).double()
    parameters = LaneParameters(lane_model.layout, 1, dtype=torch.float64)
    parameters.load(0, lane_model.layout.pad(vector))
    lane_model.bind(parameters)
    config = TypeAdapter(MethodConfig).validate_python(METHODS[method])
    merged = make_method(config).merge(dict(model.named_parameters()), lane_model.layout.split(vector))
    with torch.no_grad():
        found = torch.func.functional_call(model, merged, (images[0],))
        expected = lane_model.logits(images)[0]
        assert (expected - model(images[0])).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
