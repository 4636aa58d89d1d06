"""Mean and standard deviation of images: from the config, from the name, and a warning about a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pydantic import ValidationError

from fedpeft_dist.backbones.timm_backbone import Backbone, build_backbone
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import BackboneConfig
from tests.tiny import VIT_ARGS, VIT_NAME

SIDE = 32
IMAGENET, HALF = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def build(name: str = VIT_NAME, **values: Any) -> Backbone:
    arguments = VIT_ARGS | values.pop("model_args", {})
    return build_backbone(BackboneConfig(name=name, model_args=arguments, **values), 5, SIDE, seed=1)


def encoder() -> dict[str, torch.Tensor]:
    return timm.create_model(VIT_NAME, num_classes=0, img_size=SIDE, **VIT_ARGS).state_dict()


def under(prefix: str, change: float = 0.0) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor + change for name, tensor in encoder().items()}


@pytest.mark.parametrize(
    ("file", "wrap", "published"),
    [
        ("mae_pretrain_vit_base.pth", lambda: {"model": encoder()}, IMAGENET),
        ("w.pth", lambda: {"model": encoder() | {"decoder_embed.weight": torch.zeros(2)}}, IMAGENET),
        ("w.pth.tar", lambda: {"state_dict": under("module.base_encoder.") | under("momentum_encoder.")}, IMAGENET),
        ("w.pth.tar", lambda: {"state_dict": under("module.encoder_q.")}, IMAGENET),
        ("w.pth", lambda: {"teacher": under("backbone."), "student": under("backbone.", 1.0)}, IMAGENET),
        ("dinov2_vits14_pretrain.pth", encoder, IMAGENET),
        ("deit_tiny_patch16_224-a1311bcf.pth", lambda: {"model": encoder()}, IMAGENET),
        ("open_clip_vit.pth", encoder, CLIP),
    ],
)
def test_warns_if_a_known_publisher_normalises_differently(
    tmp_path: Path, file: str, wrap: Any, published: Any
) -> None:
    path = tmp_path / file
    torch.save(wrap(), path)
    backbone = build(checkpoint=str(path))
    assert (backbone.mean, backbone.std) == HALF
    assert backbone.warning.startswith(
        f"backbone.checkpoint: '{path}' seems to want images of mean {list(published[0])}"
    )
    assert "give backbone.mean and backbone.std" in backbone.warning
    assert "\n" not in backbone.warning
    told = build(checkpoint=str(path), mean=list(published[0]), std=list(published[1]))
    assert (told.mean, told.std, told.warning) == (*published, "")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}),
        (
            "config.json",
            {"architecture": VIT_NAME, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}},
        ),
    ],
)
def test_a_file_beside_the_weights_decides_first(tmp_path: Path, file: str, content: Any) -> None:
    torch.save(encoder(), tmp_path / "mae.pth")
    (tmp_path / file).write_text(json.dumps(content))
    warning = build(checkpoint=str(tmp_path / "mae.pth")).warning
    assert "mean [0.1, 0.2, 0.3] and std [0.4, 0.5, 0.6]" in warning
    assert file in warning
    for damaged in ("{", "[]", '{"image_mean": 3, "mean": [null]}'):
        (tmp_path / file).write_text(damaged)
        assert "'mae' in its name" in build(checkpoint=str(tmp_path / "mae.pth")).warning


def test_no_warning_without_a_reason(tmp_path: Path) -> None:
    torch.save(encoder(), tmp_path / "weights.pth")
    torch.save(encoder(), tmp_path / "mae.pth")
    assert build(checkpoint=str(tmp_path / "weights.pth")).warning == ""  # nothing shows the publisher
    assert (
        build("vit_base_patch16_224.mae", checkpoint=str(tmp_path / "mae.pth")).warning == ""
    )  # the tag names the normalization
    assert build(pretrained=False).warning == ""


def test_a_warning_for_a_grey_backbone_names_one_channel(tmp_path: Path) -> None:
    torch.save(encoder(), tmp_path / "mae.pth")
    grey = build(checkpoint=str(tmp_path / "mae.pth"), model_args={"in_chans": 1})
    assert grey.mean == (0.5,)
    assert "mean [0.449" in grey.warning
    assert build(pretrained=False, model_args={"in_chans": 1}, mean=[0.2], std=[0.3]).mean == (0.2,)


def test_the_configs_values_apply_to_any_backbone() -> None:
    assert build(pretrained=False, mean=IMAGENET[0], std=IMAGENET[1]).std == IMAGENET[1]
    grey = build_backbone(BackboneConfig(name="glyph_vit", mean=(0.1,), std=(0.3,)), 5, SIDE, seed=1)
    assert (grey.mean, grey.std) == ((0.1,), (0.3,))


@pytest.mark.parametrize(("mean", "std", "channels"), [([0.5], [0.5], 3), ([0.5] * 4, [0.5] * 4, 3)])
def test_refuses_another_number_of_values_than_channels(mean: list[float], std: list[float], channels: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"^backbone\.mean: .* for a backbone of {channels} channels; give {channels}"
    ):
        build(pretrained=False, mean=mean, std=std)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mean": [0.5, 0.5, 0.5]}, "without std; give both, or neither"),
        ({"std": [0.5, 0.5, 0.5]}, "without mean; give both, or neither"),
        ({"mean": [123.7, 116.3, 103.5], "std": [0.2, 0.2, 0.2]}, "less than or equal to 1"),
        ({"mean": [0.5], "std": [58.4]}, "less than or equal to 1"),
        ({"mean": [0.5], "std": [0.0]}, "holds 0; give values above 0"),
        ({"mean": [], "std": []}, "at least 1 item"),
        ({"mean": [float("nan")], "std": [0.5]}, "mean"),
    ],
)
def test_refuses_impossible_values(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        BackboneConfig(**values)
