"""Other families than the plain ViT: windows, convolutions, batch norm, two classifiers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fedpeft_dist.config.errors import ConfigError

from .cases import (
    METHODS,
    OPTIMIZERS,
    VIT,
    assert_same_delta,
    client_config,
    make_images,
    make_lane_model,
    make_model,
    make_tasks,
    make_trainer,
    passes_of,
    plain_batches,
    start_vector,
    train_lanes,
)
from .plain import make_plain, train_plain

LANES, BATCH = 2, 3
SIZES, STEPS = (5, 2, 4), (2, 2, 2)

# Name, arguments, image size, classifiers.
FAMILIES = {
    "deit": ("deit_tiny_patch16_224", VIT[1], 16, ["head"]),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", VIT[1], 16, ["head", "head_dist"]),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": 32,
            "window_size": 4,
            "embed_dim": 16,
            "depths": (2, 1),
            "num_heads": (2, 2),
            "drop_path_rate": 0.0,
        },
        32,
        ["head.fc"],
    ),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}, 32, ["head.fc"]),
    "resnet": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}, 32, ["fc"]),
}
TRANSFORMERS = ("deit", "deit-distilled", "swin")

CASES = [(family, method) for family in FAMILIES for method in ("full", "head", "bias", "norm")]
CASES += [(family, method) for family in TRANSFORMERS for method in ("adapter-per-block", "lora-all")]
CASES += [("deit-distilled", "adapter-shared"), ("deit-distilled", "prompt-deep"), ("deit-distilled", "prompt-shallow")]


def make_family(family: str) -> nn.Module:
    name, arguments, _, _ = FAMILIES[family]
    return make_model(name, arguments)


@pytest.mark.parametrize(("family", "method"), CASES)
def test_lanes_end_where_plain_training_ends(family, method):
    _, _, image_size, heads = FAMILIES[family]
    assert_equals_plain_training(make_family(family), METHODS[method], image_size, heads)


def assert_equals_plain_training(model: nn.Module, method: dict, image_size: int, heads: list[str]) -> None:
    images, tasks = make_images(20, image_size), make_tasks(SIZES, STEPS)
    passes = passes_of(tasks, LANES, BATCH)
    assert any(one.starting for one in passes[1:])
    assert not all(one.mask.all() for one in passes)
    lane_model = make_lane_model(model, method, image_size, torch.float64)
    vector = start_vector(lane_model, torch.float64)
    client = client_config(OPTIMIZERS["sgd"], BATCH)
    trainer = make_trainer(lane_model, images, client, LANES, torch.float64)
    buffers = copy.deepcopy(dict(lane_model.backbone.model.named_buffers()))
    updates = train_lanes(trainer, tasks, vector)

    after = dict(lane_model.backbone.model.named_buffers())
    assert set(after) == set(buffers)
    assert all(torch.equal(after[name], value) for name, value in buffers.items())
    assert not any(m.training for m in lane_model.backbone.model.modules() if isinstance(m, nn.BatchNorm2d))

    plain = make_plain(model, method, heads)
    plain.model.double()
    start = lane_model.layout.split(vector)
    for task in tasks:
        batches = plain_batches(images, task, BATCH, torch.float64)
        expected = train_plain(plain, start, batches, OPTIMIZERS["sgd"])
        assert_same_delta(lane_model.layout.split(updates[task.client].delta), expected.delta, 1e-9)


def test_families_cover_windows_batch_norm_and_two_prefix_tokens():
    """Shifted windows, blocks of several widths, batch norm with statistics of its own, two prefix tokens."""
    swin = make_family("swin")
    blocks = [module for module in swin.modules() if hasattr(module, "attn") and hasattr(module, "mlp")]
    assert any(block.attn_mask is not None for block in blocks)
    assert len({block.mlp.fc2.out_features for block in blocks}) == 2
    norms = [module for module in make_family("resnet").modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(norm.running_mean.abs().max() > 0.1 for norm in norms)
    assert make_family("deit-distilled").num_prefix_tokens == 2


@pytest.mark.parametrize("name", ["norm", "bias"])
def test_a_norm_layer_that_also_activates_is_refused(name):
    """The activation would come before the trained addition. Skipping the layer would train less than was asked."""
    model = make_model("test_efficientnet", {})
    with pytest.raises(ConfigError, match=rf"'{name}' does not fit EfficientNet: .* is a BatchNormAct2d"):
        make_lane_model(model, {"name": name})
