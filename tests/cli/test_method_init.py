"""`method.init`: a federation that starts with the parameters of an earlier run, its export, or a peft adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import export_error
import pytest
import timm
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import parse_config, result_keys
from fedpeft_dist.export import FORMATS
from fedpeft_dist.export.trained_run import TrainedRun
from fedpeft_dist.federation.start import Start, find_start
from fedpeft_dist.lanes.parameters import LaneParameters
from fedpeft_dist.methods import METHODS, build_lane_model
from fedpeft_dist.tracking.run_directory import RunDirectory
from tests.cli.conftest import Fedpeft
from tests.tiny import VIT_ARGS, VIT_NAME, tiny_tree, tiny_vit

CLASSES = export_error.CLASSES


def start_of(run: TrainedRun, folder: Path, classes: int = CLASSES, deferred: bool = False, **sections: Any) -> Start:
    """The start of a run like another one from a folder, with other keys in some sections.

    Args:
        deferred: the frozen matrices of the repeated blocks have no memory yet, as under sharding.
    """
    tree = json.loads(run.config.model_dump_json())
    tree["method"]["init"] = str(folder)
    for name, keys in sections.items():
        tree[name] |= keys
    config = parse_config(tree, "test")
    model = build_lane_model(config, classes, deferred=deferred)
    assert deferred == any(tensor.is_meta for tensor in model.backbone.model.parameters())
    return find_start(config, model)


def written(run: TrainedRun, name: str, folder: Path) -> Path:
    """The folder of an export, as a run of the same backbone writes it."""
    folder.mkdir(parents=True)
    metadata = {"backbone_sha256": run.backbone.sha256}
    told = TrainedRun(run.config, run.trained, metadata, run.model, run.frozen, run.num_classes, run.recipe)
    FORMATS[name].write(told, folder)
    return folder


@pytest.fixture
def lora(tmp_path: Path) -> tuple[TrainedRun, Path, Path]:
    """A run, its safetensors export and its peft adapter."""
    run = export_error.trained_run("lora", tiny=True)
    return run, written(run, "safetensors", tmp_path / "st"), written(run, "peft", tmp_path / "peft")


@pytest.mark.parametrize("method", export_error.SECTIONS)
def test_every_method_starts_from_its_own_exports(method: str, tmp_path: Path) -> None:
    kind = METHODS[export_error.SECTIONS[method]]
    run = export_error.trained_run(method, tiny=True)
    expected = run.model.layout.join(run.trained)
    for name in ("safetensors", *(["peft"] if kind.to_peft else [])):
        start = start_of(run, written(run, name, tmp_path / name))
        assert torch.equal(start.vector, expected)
        assert start.note == f"starts from '{tmp_path / name}'"
        assert len(start.sha256) == 64


@pytest.mark.parametrize("method", [name for name, kind in export_error.SECTIONS.items() if METHODS[kind].to_peft])
def test_a_sharded_run_starts_from_a_peft_adapter(method: str, tmp_path: Path, monkeypatch) -> None:
    two_blocks = export_error.TINY["backbone.model_args"] | {"depth": 2}
    monkeypatch.setitem(export_error.TINY, "backbone.model_args", two_blocks)
    run = export_error.trained_run(method, tiny=True)
    start = start_of(run, written(run, "peft", tmp_path / "peft"), deferred=True)
    assert torch.equal(start.vector, run.model.layout.join(run.trained))


def test_an_adapter_that_peft_has_made_computes_the_same_here(tmp_path: Path) -> None:
    backbone = timm.create_model(VIT_NAME, img_size=16, num_classes=CLASSES, **VIT_ARGS).eval()
    save_file(backbone.state_dict(), tmp_path / "backbone.safetensors")
    targets = ["attn.qkv", "mlp.fc1"]
    settings = LoraConfig(r=4, lora_alpha=6, target_modules=targets, modules_to_save=["head"], init_lora_weights=False)
    adapted = get_peft_model(backbone, settings).eval()
    adapted.base_model.model.head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    adapted.save_pretrained(tmp_path / "adapter")
    config = parse_config(
        tiny_tree(
            backbone=tiny_vit() | {"checkpoint": str(tmp_path / "backbone.safetensors")},
            method={"name": "lora", "rank": 4, "alpha": 6.0, "targets": ["qkv", "fc1"], "init": f"{tmp_path}/adapter"},
        ),
        "test",
    )
    model = build_lane_model(config, CLASSES)
    parameters = LaneParameters(model.layout, num_lanes=1, dtype=torch.float64, with_grad=False)
    parameters.load(0, model.layout.pad(find_start(config, model).vector))
    for computing in (model.backbone.model, adapted, backbone):  # in float32, some random weights round by more
        computing.double()
    model.bind(parameters)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        expected = adapted(images)
        torch.testing.assert_close(model.logits(images.unsqueeze(0))[0], expected, rtol=1e-9, atol=1e-9)
        assert (expected - backbone(images)).abs().max() == 0  # peft has put its layers into the model
    assert expected.std() > 0.1


def test_a_head_of_other_classes_starts_anew_and_the_log_says_so(lora: tuple[TrainedRun, Path, Path]) -> None:
    run, exported, adapter = lora
    fresh = build_lane_model(run.config, 7)
    start = start_of(run, adapter, classes=7)
    found = fresh.layout.split(start.vector)
    assert torch.equal(found["head.weight"], fresh.initial["head.weight"])
    for name in found.keys() - {"head.weight", "head.bias"}:
        assert torch.equal(found[name], run.trained[name])
    told = "head.weight is 10 x 32 there and 7 x 32 here; head.bias is 10 there and 7 here"
    assert start.note == f"starts from '{adapter}', but with a fresh head: {told}"
    assert "random weights, with another seed or other classes" in refusal(run, exported, classes=7)
    bias = export_error.trained_run("bias", tiny=False)
    start = start_of(bias, written(bias, "safetensors", exported / "bias"), classes=7)
    assert start.note.endswith("head.weight is 10 x 128 there and 7 x 128 here; head.bias is 10 there and 7 here")
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({n: t for n, t in weights.items() if "head" not in n}, adapter / "adapter_model.safetensors")
    assert "head.weight is not there; head.bias is not there" in start_of(run, adapter).note


def refusal(run: TrainedRun, folder: Path, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        start_of(run, folder, **more)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"method.init: '{folder}'")
    return message.removeprefix(f"method.init: '{folder}'")


def test_refuses_other_settings_shapes_and_backbones(lora: tuple[TrainedRun, Path, Path]) -> None:
    run, exported, adapter = lora
    smaller = {"rank": 4, "alpha": 8.0}
    assert "'blocks.0.attn.qkv.lora_A.weight' is 8 x 32 there and 4 x 32 here" in refusal(run, exported, method=smaller)
    assert "r (8 there, 4 here)" in refusal(run, adapter, method=smaller)
    assert "alpha (16.0 there, 5.0 here)" in refusal(run, exported, method={"alpha": 5.0})
    assert "lora_alpha (16 there, 5 here)" in refusal(run, adapter, method={"alpha": 5.0})
    for folder in (exported, adapter):
        told = refusal(run, folder, method={"targets": ["qkv", "fc1"]})
        assert "lacks 'blocks.0.mlp.fc1.lora_A.weight'" in told
        told = refusal(run, folder, method={"targets": ["fc1"]})
        assert "lacks 'blocks.0.mlp.fc1.lora_A.weight'" in told
    wider = {**export_error.TINY["backbone.model_args"], "embed_dim": 64}
    for folder in (exported, adapter):
        assert "is 8 x 32 there and 8 x 64 here" in refusal(run, folder, backbone={"model_args": wider})
    start_of(run, exported, method={"dropout": 0.1})


def test_refuses_folders_that_are_something_else(lora: tuple[TrainedRun, Path, Path], tmp_path: Path) -> None:
    run, exported, adapter = lora
    other = export_error.trained_run("bias", tiny=True)
    assert refusal(other, exported) == " was trained by method 'lora', not 'bias'; give another folder"
    assert "peft does not know method 'bias'" in refusal(other, adapter)
    norm = export_error.trained_run("norm", tiny=True)
    assert "peft_type (LORA there, LN_TUNING here)" in refusal(norm, adapter)
    assert refusal(run, tmp_path / "absent").startswith(" is no folder; give a complete run's directory")
    assert refusal(run, tmp_path).startswith(" holds nothing to start from; give")
    keys = json.loads((adapter / "adapter_config.json").read_text())
    for key in ("use_rslora", "use_dora"):
        (adapter / "adapter_config.json").write_text(json.dumps(keys | {key: True}))
        assert f"{key} (True there, None here)" in refusal(run, adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(keys))
    weights = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.blocks.0.attn.qkv.lora_A.weight"
    save_file({**weights, f"{name}.more": weights[name].clone()}, adapter / "adapter_model.safetensors")
    assert "has 'blocks.0.attn.qkv.lora_A.weight.more'" in refusal(run, adapter)
    weights[name][0, 0] = float("nan")
    save_file(weights, adapter / "adapter_model.safetensors")
    assert "not finite" in refusal(run, adapter)
    (adapter / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors cannot be read" in refusal(run, adapter)
    head = export_error.trained_run("head", tiny=True)
    exported = written(head, "safetensors", tmp_path / "head")
    assert "holds nothing to start from: head.weight is 10 x 32 there" in refusal(head, exported, classes=7)


# --- whole runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def config_file(folder: Path) -> Callable[..., str]:
    """config_file(name, init=...): the file of a short run of LoRA."""

    def write(name: str, rounds: int = 1, **method: Any) -> str:
        own = {"name": "lora", "rank": 2, **method}
        tree = tiny_tree(method=own, federation={"rounds": rounds}, output={"name": name})
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
        return f"{name}.yaml"

    return write


def test_a_run_goes_on_only_with_the_start_that_it_had(
    folder: Path, fedpeft: Fedpeft, config_file: Callable[..., str]
) -> None:
    assert fedpeft("train", config_file("first")).code == 0
    first = RunDirectory(folder / "runs" / "first")
    done = fedpeft("train", config_file("second", init="runs/first"))
    assert done.code == 0
    assert "runs/second: starts from 'runs/first'" in done.out
    tensors, metadata = RunDirectory(folder / "runs" / "second").read_trainable()
    before, _ = first.read_trainable()
    assert tensors.keys() == before.keys()
    assert not torch.equal(tensors["head.weight"], before["head.weight"])

    kept = first.trainable_file.read_bytes()
    first.write_trainable({name: tensor * 1.5 for name, tensor in before.items()}, metadata)
    refused = fedpeft("train", config_file("second", rounds=2, init="runs/first"))
    assert refused.code == 2
    assert "runs/second was begun from other parameters" in refused.err
    assert "give back the files of method.init" in refused.err
    first.trainable_file.write_bytes(kept)
    assert "method.init" in fedpeft("train", config_file("second", rounds=2)).err
    again = fedpeft("train", config_file("second", rounds=2, init="runs/first"))
    assert (again.code, "starts from" in again.out) == (0, False)

    shutil.rmtree(first.path)  # what is trained stands by itself
    assert fedpeft("evaluate", "runs/second").code == 0
    assert fedpeft("export", "runs/second", "--format", "timm").code == 0


def test_an_unfinished_run_is_no_start(folder: Path, fedpeft: Fedpeft, config_file: Callable[..., str]) -> None:
    first = RunDirectory(folder / "runs" / "first")
    first.path.mkdir(parents=True)
    shutil.copy(folder / config_file("first"), first.config_file)
    first.write_state("interrupted", 1)
    refused = fedpeft("train", config_file("second", init="runs/first"))
    assert refused.code == 2
    assert refused.err == "error: method.init: 'runs/first' is a run that is interrupted; give a complete one\n"


def test_the_key_changes_a_runs_name_only_where_it_is_given() -> None:
    assert "method.init" not in result_keys(parse_config(tiny_tree(), "test"))
    given = parse_config(tiny_tree(method={"name": "head", "init": "runs/first"}), "test")
    assert result_keys(given)["method.init"] == "runs/first"
