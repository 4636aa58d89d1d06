"""Files of weights: reading without running code, refusals and their messages, and weights in several files."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import pickle
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from fedpeft_dist.backbones.timm_backbone import build_backbone
from fedpeft_dist.backbones.weight_files import UnfitWeightsError, read_weights
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import BackboneConfig
from tests.tiny import VIT_ARGS, VIT_NAME

SIDE = 16
WEIGHTS = {"weight": torch.ones(3)}


def build(path: Path | str) -> nn.Module:
    config = BackboneConfig(name=VIT_NAME, checkpoint=str(path), model_args=VIT_ARGS)
    return build_backbone(config, 5, SIDE, seed=1).model


def state() -> dict[str, torch.Tensor]:
    return timm.create_model(VIT_NAME, num_classes=7, img_size=SIDE, **VIT_ARGS).state_dict()


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as error:
        build(path)
    message = str(error.value)
    assert message.startswith(f"backbone.checkpoint: '{path}' ")
    for unwanted in ("\n", "\x1b", "weights_only", "trust", "add_safe_globals"):
        assert unwanted not in message
    return message


# --- pickles -----------------------------------------------------------------------------------------------------


class Custom:
    """A class of a user."""


class Command:
    def __reduce__(self) -> Any:
        return os.system, ("false",)


HARMLESS = {
    "parsed arguments": argparse.Namespace(lr=0.1, out=Path("out")),
    "float64": np.float64(3.0),
    "float32": np.float32(3.0),
    "int64": np.int64(3),
    "bool": np.bool_(True),
    "array": np.ones(3),
    "dtype": np.dtype("float32"),
    "path": Path("/tmp/x"),
    "path of Windows": pathlib.PureWindowsPath("c:/x"),
    "ordered": OrderedDict(a=1),
    "time": datetime.datetime(2024, 1, 1),
    "duration": datetime.timedelta(seconds=3),
    "size": torch.Size([3]),
}
HARMFUL = {
    "a class": (Custom(), "test_weight_files.Custom"),
    "a command": (Command(), "posix.system"),
    "a function": (len, "len"),
    "a module": (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("kind", HARMLESS)
def test_reads_weights_beside_harmless_objects(tmp_path: Path, kind: str, is_zip: bool) -> None:
    content = {"state_dict": WEIGHTS, "neighbour": HARMLESS[kind], "epoch": 3}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=is_zip)
    read = read_weights(tmp_path / "w.pth")
    assert torch.equal(read["state_dict"]["weight"], WEIGHTS["weight"])
    assert read["epoch"] == 3


@pytest.mark.parametrize("name", [b"cposixpath\nPosixPath\n", b"cpathlib._local\nPosixPath\n", b"cpathlib\nPath\n"])
def test_reading_a_path_creates_no_path(tmp_path: Path, name: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python versions keep path classes in different modules, and Windows cannot create a PosixPath."""
    monkeypatch.setattr(pathlib.Path, "__new__", lambda *_: pytest.fail("a path was made"))
    known = name.startswith(b"cpathlib")
    legacy = tmp_path / "w.pth"
    with legacy.open("wb") as file:
        for header in (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True}):
            pickle.dump(header, file, protocol=2)
        file.write(b"\x80\x02}X\x01\x00\x00\x00a" + name + b"X\x01\x00\x00\x00x\x85Rs.")
        pickle.dump([], file, protocol=2)
    if known:
        assert read_weights(legacy).keys() == {"a"}
    else:
        with pytest.raises(UnfitWeightsError, match=r"posixpath\.PosixPath"):
            read_weights(legacy)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("kind", HARMFUL)
def test_refuses_and_names_other_objects(tmp_path: Path, kind: str, is_zip: bool) -> None:
    content, name = HARMFUL[kind]
    path = tmp_path / "w.pth"
    torch.save(WEIGHTS | {"extra": content}, path, _use_new_zipfile_serialization=is_zip)
    message = refusal(path)
    assert name in message
    assert "which could run code; save the model's state_dict() alone" in message


def test_names_at_most_five_unknown_objects(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Conv2d(1, 1, 1), nn.ReLU(), nn.GELU(), nn.LayerNorm(1), nn.Dropout())
    torch.save({"model": model}, tmp_path / "w.pth")
    message = refusal(tmp_path / "w.pth")
    assert message.count("torch.nn.modules.") == 5
    assert " more, which could run code" in message


def test_recognises_pickles_that_torch_save_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"a": defaultdict(int)}, protocol=4))
    assert "it is damaged, or no file of torch.save: Unsupported operand" in refusal(tmp_path / "w.pth")
    torch.jit.script(nn.Linear(1, 1)).save(tmp_path / "w.pt")
    assert "it is a TorchScript archive; save the model's state_dict()" in refusal(tmp_path / "w.pt")


# --- files that hold no weights -----------------------------------------------------------------------------------

PAGES = [
    b"<!DOCTYPE html><html>",
    b"\n  <html><head>",
    b"<!doctype HTML>",
    b'<?xml version="1.0"?>',
    b"<!-- x --><html>",
]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin", ".npz", ".safetensors.index.json"])
def test_recognises_the_leftovers_of_a_failed_download(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    for page in PAGES:
        path.write_bytes(page + b" " * 500)
        assert "it is a web page, not weights" in refusal(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert "it is a Git LFS pointer, not weights" in refusal(path)
    path.write_bytes(b"")
    assert "it is empty" in refusal(path)


def test_checks_timms_own_files_for_a_failed_download(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(PAGES[0])
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "w.safetensors")}}
    config = BackboneConfig(name=VIT_NAME, model_args=VIT_ARGS | overlay)
    with pytest.raises(ConfigError, match=r"^backbone\.pretrained: the weights of .*it is a web page"):
        build_backbone(config, 5, SIDE, seed=1)


# --- places and names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.PTH", "W.Pth.Tar", "w.SafeTensors", "w.PT", "w.BIN"])
def test_suffixes_may_be_in_capitals(tmp_path: Path, name: str) -> None:
    weights = state()
    (save_file if "safe" in name.lower() else torch.save)(weights, tmp_path / name)
    assert torch.equal(build(tmp_path / name).cls_token, weights["cls_token"])


def test_a_tilde_means_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    weights = state()
    save_file(weights, tmp_path / "w.safetensors")
    assert torch.equal(build("~/w.safetensors").cls_token, weights["cls_token"])
    with pytest.raises(ConfigError, match=rf"^backbone\.checkpoint: '{tmp_path}/none\.pth': no such file"):
        build("~/none.pth")


# --- files in several parts --------------------------------------------------------------------------------------


def write_index(folder: Path, suffix: str, weights: dict[str, torch.Tensor]) -> Path:
    """Writes weights as transformers write a large model: two files, and an index from tensors to files."""
    names = sorted(weights)
    files = {f"model-0000{i + 1}-of-00002{suffix}": names[i::2] for i in range(2)}
    for file, held in files.items():
        (save_file if suffix == ".safetensors" else torch.save)({name: weights[name] for name in held}, folder / file)
    index = folder / f"model{suffix}.index.json"
    places = {name: file for file, held in files.items() for name in held}
    index.write_text(json.dumps({"metadata": {"total_size": 3}, "weight_map": places}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_an_index_loads_the_tensors_of_all_its_files(tmp_path: Path, suffix: str) -> None:
    weights = state()
    loaded = build(write_index(tmp_path, suffix, weights)).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items() if not name.startswith("head."))


def test_refuses_one_of_several_files(tmp_path: Path) -> None:
    write_index(tmp_path, ".safetensors", state())
    assert "is one of several files; give their .index.json" in refusal(tmp_path / "model-00001-of-00002.safetensors")
    save_file(state(), tmp_path / "model-00001-of-00001.safetensors")
    build(tmp_path / "model-00001-of-00001.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index.pop("weight_map"), "has no 'weight_map'"),
        (lambda index: index.update(weight_map=[]), "has no 'weight_map'"),
        (lambda index: index["weight_map"].update(a="none.safetensors"), "names 'none.safetensors', which is no file"),
        (lambda index: index["weight_map"].update(a="../w.safetensors"), "names '../w.safetensors', which is no file"),
        (lambda index: index["weight_map"].update(a=3), "names '3', which is no file"),
        (lambda index: index["weight_map"].update(a="model-00001-of-00002.safetensors"), "'a' is not in 'model-00001"),
    ],
)
def test_refuses_a_wrong_index(tmp_path: Path, change: Any, words: str) -> None:
    path = write_index(tmp_path, ".safetensors", state())
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    assert words in refusal(path)


def test_names_a_damaged_part(tmp_path: Path) -> None:
    path = write_index(tmp_path, ".safetensors", state())
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(PAGES[0])
    assert "'model-00002-of-00002.safetensors' cannot be loaded (it is a web page" in refusal(path)
