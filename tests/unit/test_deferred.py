"""A backbone that is made tensor by tensor has the bits of one that is made at once, whatever fills its tensors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedpeft_dist.backbones.deferred import made
from fedpeft_dist.backbones.glyph_vit import GLYPH_VIT
from fedpeft_dist.backbones.timm_backbone import Backbone, build_backbone
from fedpeft_dist.config.schema import BackboneConfig
from fedpeft_dist.methods.quantized import quantize_frozen
from fedpeft_dist.runtime.memory import forget_peak_memory, peak_memory, return_large_blocks, used_memory
from tests.tiny import VIT_ARGS, VIT_NAME
from tests.warm_process import WarmProcess
from tests.weight_fixtures import with_changed_tensors

FAMILIES = {
    "vit": {"name": VIT_NAME, "model_args": VIT_ARGS | {"depth": 2}},
    "eva": {"name": "eva02_tiny_patch14_224", "model_args": {"embed_dim": 48, "depth": 2, "num_heads": 2}},
    "beit": {"name": "beit_base_patch16_224", "model_args": {"embed_dim": 48, "depth": 2, "num_heads": 2}},
    "convnext": {"name": "test_convnext"},
    "swin": {"name": "swin_tiny_patch4_window7_224", "model_args": {"embed_dim": 24, "depths": (2, 2)}},
    "relpos": {"name": "test_vit_relpos"},
}

LARGER = {"name": VIT_NAME, "model_args": {"depth": 12, "embed_dim": 312, "num_heads": 4}}


def build(deferred: bool, checkpoint: Path | None = None, image_size: int = 224, **section: Any) -> Backbone:
    own = None if checkpoint is None else str(checkpoint)
    config = BackboneConfig(pretrained=False, checkpoint=own, **section)
    return build_backbone(config, num_classes=3, image_size=image_size, seed=3, deferred=deferred)


def assert_equal(deferred: Backbone, whole: Backbone) -> None:
    assert deferred.sha256 == whole.sha256
    expected = whole.model.state_dict()
    for name, tensor in deferred.model.state_dict(keep_vars=True).items():
        assert torch.equal(made(tensor), expected[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_are_the_same(family: str) -> None:
    deferred, whole = (build(is_deferred, **FAMILIES[family]) for is_deferred in (True, False))
    assert_equal(deferred, whole)
    inside = [p for block in deferred.blocks for p in block.parameters() if p.dim() == 2]
    assert inside
    assert all(parameter.is_meta for parameter in inside), "no matrix of a block has memory of its own"


def test_the_embedded_backbone_is_the_same() -> None:
    config = BackboneConfig(name=GLYPH_VIT)
    made_later, whole = (build_backbone(config, 3, 32, seed=3, deferred=is_deferred) for is_deferred in (True, False))
    assert_equal(made_later, whole)


def write_files(folder: Path, kind: str, model: nn.Module) -> Path:
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if kind == "pth":
        torch.save(state, folder / "weights.pth")
        return folder / "weights.pth"
    if kind == "safetensors":
        save_file(state, folder / "weights.safetensors")
        return folder / "weights.safetensors"
    names = sorted(state)
    parts = {f"w-{i + 1:05d}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, own in parts.items():
        save_file({name: state[name] for name in own}, folder / file)
    index = folder / "w.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, own in parts.items() for name in own}}))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "index", "pth"])
def test_weights_of_a_file_are_the_same(tmp_path: Path, kind: str) -> None:
    path = write_files(tmp_path, kind, with_changed_tensors(build(False, **FAMILIES["vit"]).model))
    assert_equal(build(True, path, **FAMILIES["vit"]), build(False, path, **FAMILIES["vit"]))


def test_loading_takes_no_memory_for_the_whole_model(tmp_path: Path) -> None:
    """A model of 52 MiB. Its tensors come from the file one by one, and the kernel takes the file's pages back.

    A process of its own has no memory that earlier tests have left to it.
    """
    path = write_files(tmp_path, "safetensors", build(False, **LARGER).model)
    done = WarmProcess(load_one_by_one, tmp_path, [str(path)]).finish()
    assert done.returncode == 0, done.stderr
    whole, growth, quantized = json.loads(done.stdout)
    assert whole > 50 * 2**20
    assert growth < whole / 3
    assert quantized < whole / 3


def load_one_by_one() -> None:
    """Prints the bytes of the model in a file, and by how much the process grows while it loads them, whole and in 8
    bits."""
    host = torch.device("cpu")
    return_large_blocks()  # as where a run's ranks form groups
    build(True, **FAMILIES["vit"])  # imports what building needs
    figures = []
    for quantize in (False, True):
        forget_peak_memory(host)
        before = used_memory(host)
        backbone = build(True, Path(sys.argv[1]), **LARGER)
        whole = sum(tensor.nbytes for tensor in backbone.model.parameters())
        if quantize:
            quantize_frozen(backbone.model, backbone.model, torch.float32)
        for block in backbone.blocks:
            for parameter in block.parameters():
                made(parameter)
        figures.append(peak_memory(host) - before)
    print(json.dumps([whole, *figures]))
