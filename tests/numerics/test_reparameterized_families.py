"""Methods that change or re-parameterise frozen layers, on families other than the plain ViT."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedpeft_dist.backbones.timm_backbone import classifier_names
from fedpeft_dist.config.errors import ConfigError

from .cases import (
    METHODS,
    OPTIMIZERS,
    REPARAMETERIZED,
    assert_same_delta,
    client_config,
    make_images,
    make_lane_model,
    make_model,
    make_tasks,
    make_trainer,
    plain_batches,
    start_vector,
    train_lanes,
)
from .plain import make_plain, train_plain
from .test_families import FAMILIES as OTHERS

LANES, BATCH = 2, 3
SIZES, STEPS = (5, 2, 4), (2, 2, 2)
SMALL = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 28}
# Name, arguments, image size. Two prefix tokens; windows; convolutions; register tokens with layer scales; rotary
# positions with separate biases.
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    **{family: OTHERS[family][:3] for family in ("deit-distilled", "swin", "convnext")},
    "dinov2": ("vit_small_patch14_reg4_dinov2", SMALL, 28),
    "eva": ("eva02_tiny_patch14_224", SMALL, 28),
}
NO_QKV = "method.targets: 'qkv' matches no linear layer (attn.qkv or token_mixer.qkv or xca.qkv) in ConvNeXt"
NO_PART = "method.targets: {!r} matches no linear layer (attn.qkv or attn.{}_proj) in ConvNeXt"
WIDTHS = "does not fit SwinTransformer: its blocks have the widths [16, 32]; one tensor needs one width"
PIECES = "does not fit Eva: blocks.0.mlp.fc1 (32 x 170) cannot be cut into pieces of 32 x 32"
REFUSALS = {
    ("convnext", "lora-parts"): NO_PART.format("q", "q"),
    ("convnext", "ia3"): NO_PART.format("k", "k"),
    **{("convnext", method): NO_QKV for method in ("dora", "vera", "fact-tt", "fact-tk")},
    ("swin", "fact-tt"): f"method.name: 'fact_tt' {WIDTHS}",
    ("swin", "fact-tk"): f"method.name: 'fact_tk' {WIDTHS}",
    ("eva", "fact-tt"): f"method.name: 'fact_tt' {PIECES}",
    ("eva", "fact-tk"): f"method.name: 'fact_tk' {PIECES}",
}
CELLS = [(family, method) for family in FAMILIES for method in REPARAMETERIZED]


@pytest.mark.parametrize(("family", "method"), [cell for cell in CELLS if cell not in REFUSALS])
def test_lanes_end_where_plain_training_ends(family: str, method: str) -> None:
    name, arguments, image_size = FAMILIES[family]
    model, images, tasks = make_model(name, arguments), make_images(20, image_size), make_tasks(SIZES, STEPS)
    lane_model = make_lane_model(model, METHODS[method], image_size, torch.float64)
    vector = start_vector(lane_model, torch.float64)
    trainer = make_trainer(lane_model, images, client_config(OPTIMIZERS["sgd"], BATCH), LANES, torch.float64)
    updates = train_lanes(trainer, tasks, vector)
    plain = make_plain(model, METHODS[method], classifier_names(model))
    plain.model.double()
    start = lane_model.layout.split(vector)
    for task in tasks:
        batches = plain_batches(images, task, BATCH, torch.float64)
        expected = train_plain(plain, start, batches, OPTIMIZERS["sgd"])
        assert_same_delta(lane_model.layout.split(updates[task.client].delta), expected.delta, 1e-9)


@pytest.mark.parametrize(("family", "method"), REFUSALS)
def test_a_misfit_is_refused_in_one_line(family: str, method: str) -> None:
    name, arguments, image_size = FAMILIES[family]
    with pytest.raises(ConfigError) as caught:
        make_lane_model(make_model(name, arguments), METHODS[method], image_size)
    assert str(caught.value) == REFUSALS[family, method]


def test_parts_of_an_attention_that_orders_its_outputs_by_heads_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        make_lane_model(make_model("tiny_vit_5m_224", {"depths": (1, 1, 1, 1)}), METHODS["ia3"], 224)
    told = "does not fit TinyVit, whose stages.1.blocks.0.attn.qkv orders its outputs by heads"
    assert str(caught.value) == f"method.targets: 'k' {told}"
