"""Checkpoints as self-supervised pre-training leaves them: MAE's and MoCo v3's, and the files that are refused."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from fedpeft_dist.backbones.timm_backbone import Backbone, build_backbone
from fedpeft_dist.backbones.weight_files import WEIGHT_SUFFIXES
from fedpeft_dist.config import schema
from fedpeft_dist.config.errors import ConfigError
from tests import tiny

CLASSES, SIDE, WIDTH = 5, 32, 24
VIT, VIT_ARGS = tiny.VIT_NAME, tiny.VIT_ARGS | {"patch_size": 16, "embed_dim": WIDTH, "depth": 2}
State = dict[str, torch.Tensor]


def build(checkpoint: Path | None, name: str = VIT, **model_args: Any) -> Backbone:
    arguments = VIT_ARGS | model_args if name == VIT else model_args
    path = None if checkpoint is None else str(checkpoint)
    config = schema.BackboneConfig(name=name, pretrained=False, checkpoint=path, model_args=arguments)
    return build_backbone(config, CLASSES, SIDE, seed=1)


@pytest.fixture
def encoder() -> State:
    """A ViT without a head, as it comes out of pre-training."""
    return encoder_state(timm.create_model(VIT, num_classes=0, img_size=SIDE, **VIT_ARGS))


def encoder_state(model: nn.Module) -> State:
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.rand(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }


def mae(encoder: State) -> dict[str, Any]:
    return {"model": encoder}


def mae_with_decoder(encoder: State) -> dict[str, Any]:
    """The longer of MAE's files: what its training goes on from."""
    decoder = {
        "mask_token": torch.zeros(1, 1, 8),
        "decoder_pos_embed": torch.zeros(1, 5, 8),
        "decoder_embed.weight": torch.zeros(8, WIDTH),
        "decoder_blocks.0.norm1.weight": torch.zeros(8),
        "decoder_pred.weight": torch.zeros(768, 8),
    }
    scaler = {"scale": 65536.0, "_growth_tracker": 3}
    arguments = argparse.Namespace(lr=1e-3, model="mae_vit_base_patch16", output_dir="out")
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
    return {"model": encoder | decoder, "optimizer": optimizer, "epoch": 3, "scaler": scaler, "args": arguments}


def moco(encoder: State, head: str = "head", arch: str = "vit_base") -> dict[str, Any]:
    """Both encoders, each with an MLP for a head, and the predictor, all wrapped for distributed training."""

    def mlp(prefix: str) -> State:
        return {
            f"{prefix}.0.weight": torch.zeros(16, WIDTH),
            f"{prefix}.1.weight": torch.zeros(16),
            f"{prefix}.1.running_mean": torch.zeros(16),
            f"{prefix}.3.weight": torch.zeros(8, 16),
        }

    state = {f"module.base_encoder.{name}": tensor for name, tensor in encoder.items()}
    state |= {f"module.momentum_encoder.{name}": tensor + 1 for name, tensor in encoder.items()}
    state |= mlp(f"module.base_encoder.{head}") | mlp(f"module.momentum_encoder.{head}") | mlp("module.predictor")
    return {"epoch": 300, "arch": arch, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}


def moco_linear_probe(encoder: State) -> dict[str, Any]:
    state = encoder | {"head.weight": torch.ones(1000, WIDTH), "head.bias": torch.ones(1000)}
    state = {f"module.{name}": tensor for name, tensor in state.items()}
    return {"epoch": 90, "arch": "vit_base", "state_dict": state, "best_acc1": torch.tensor(76.5), "optimizer": {}}


LAYOUTS: list[Callable[[State], dict[str, Any]]] = [mae, mae_with_decoder, moco, moco_linear_probe]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".pt", ".bin"])
def test_pretrainings_bring_every_tensor_and_no_head(
    tmp_path: Path, encoder: State, layout: Callable[[State], dict[str, Any]], suffix: str
) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(layout(encoder), path)
    loaded, fresh = build(path).model.state_dict(), build(None).model.state_dict()
    assert loaded.keys() == encoder.keys() | {"head.weight", "head.bias"}
    for name, tensor in loaded.items():
        assert torch.equal(tensor, encoder.get(name, fresh[name])), name


def test_the_encoders_tensors_may_come_as_safetensors_too(tmp_path: Path, encoder: State) -> None:
    save_file(moco(encoder)["state_dict"], tmp_path / "moco.safetensors")
    save_file(encoder, tmp_path / "plain.safetensors")
    assert build(tmp_path / "moco.safetensors").sha256 == build(tmp_path / "plain.safetensors").sha256


def test_moco_with_a_resnet(tmp_path: Path) -> None:
    name = "test_resnet"
    encoder = encoder_state(timm.create_model(name, num_classes=0))
    torch.save(moco(encoder, head="fc", arch="resnet50"), tmp_path / "r.pth.tar")
    loaded, fresh = build(tmp_path / "r.pth.tar", name).model.state_dict(), build(None, name).model.state_dict()
    assert {"fc.weight", "bn1.running_mean"} <= loaded.keys()
    for key, tensor in loaded.items():
        assert torch.equal(tensor, encoder.get(key, fresh[key])), key


def test_another_image_size_resamples_the_position_table(tmp_path: Path) -> None:
    larger = encoder_state(timm.create_model(VIT, num_classes=0, img_size=64, **VIT_ARGS))
    torch.save(mae(larger), tmp_path / "w.pth")
    model = build(tmp_path / "w.pth").model
    assert model.pos_embed.shape == (1, 5, WIDTH)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, larger["blocks.1.mlp.fc1.weight"])


def test_mocos_small_vit_has_twelve_attention_heads(tmp_path: Path, encoder: State) -> None:
    """Its shapes are those of timm's small ViT with six, which would load without a word and compute something else."""
    path = tmp_path / "vit-s-300ep.pth.tar"
    torch.save(moco(encoder, arch="vit_small"), path)
    with pytest.raises(ConfigError, match=r"vit_small with 12 attention heads, .* has 2; .*\{num_heads: 12\}") as error:
        build(path)
    assert str(path) in str(error.value)
    assert build(path, num_heads=12).model.blocks[0].attn.num_heads == 12


def test_what_the_training_was_started_with_is_no_code(tmp_path: Path, encoder: State) -> None:
    """argparse's Namespace is let through; a class of someone's own is not."""
    torch.save({"model": encoder, "args": argparse.Namespace(lr=0.1)}, tmp_path / "namespace.pth")
    build(tmp_path / "namespace.pth")
    torch.save({"model": encoder, "args": nn.Linear(1, 1)}, tmp_path / "module.pth")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build(tmp_path / "module.pth")


def without(name: str) -> Callable[[State], dict[str, Any]]:
    return lambda encoder: moco({key: tensor for key, tensor in encoder.items() if key != name})


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (without("blocks.1.norm1.weight"), r"lacks 1 of the model's tensors, 'blocks\.1\.norm1\.weight'"),
        (lambda encoder: moco({}), r"lacks 30 of the model's tensors, 'cls_token' among them"),
        (lambda encoder: mae(encoder | {"cls_token": torch.zeros(1, 1, 7)}), "cannot be loaded .*cls_token"),
        (lambda encoder: [encoder], "cannot be loaded .*holds a list, not tensors by name"),
        (lambda encoder: {"epoch": 3}, "lacks 30 of the model's tensors|cannot be loaded"),
    ],
    ids=["a tensor missing", "an empty encoder", "another shape", "a list", "no tensors"],
)
def test_what_does_not_fit_is_told_in_one_line(
    tmp_path: Path, encoder: State, layout: Callable[[State], Any], words: str
) -> None:
    path = tmp_path / "w.pth.tar"
    torch.save(layout(encoder), path)
    with pytest.raises(ConfigError, match=words) as error:
        build(path)
    assert str(error.value).startswith(f"backbone.checkpoint: '{path}' ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", WEIGHT_SUFFIXES)
def test_a_file_cut_short_is_told_in_one_line(tmp_path: Path, encoder: State, suffix: str) -> None:
    path = tmp_path / f"cut{suffix}"
    torch.save(mae(encoder), path) if suffix != ".safetensors" else save_file(encoder, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ConfigError, match="cannot be loaded") as error:
        build(path)
    assert str(error.value).startswith(f"backbone.checkpoint: '{path}' ")
    assert "\n" not in str(error.value)


def test_another_architecture_is_told(tmp_path: Path, encoder: State) -> None:
    torch.save(mae(encoder), tmp_path / "vit.pth")
    with pytest.raises(ConfigError, match=r"vit\.pth' lacks \d+ of the model's tensors, 'conv1\.0\.weight'"):
        build(tmp_path / "vit.pth", "test_resnet")
    with pytest.raises(ConfigError, match=r"vit\.pth' lacks 12 of the model's tensors, 'blocks\.2\."):
        build(tmp_path / "vit.pth", depth=3)
