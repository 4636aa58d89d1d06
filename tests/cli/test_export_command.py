"""`fedpeft export`: real runs, reloaded by plain timm and plain peft, give what the run itself computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
import yaml
from peft import PeftModel, get_peft_model_state_dict
from PIL import ExifTags, Image
from safetensors import safe_open
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import fedpeft_dist
from fedpeft_dist import cli, export
from fedpeft_dist.backbones.timm_backbone import freeze
from fedpeft_dist.config.load import load_config
from fedpeft_dist.data import load_dataset
from fedpeft_dist.data.augment import make_transform
from fedpeft_dist.data.recipe import ImageRecipe
from fedpeft_dist.data.store import DeviceStore
from fedpeft_dist.export import formats
from fedpeft_dist.export.trained_run import load_run
from fedpeft_dist.lanes.parameters import LaneParameters
from fedpeft_dist.methods import build_lane_model
from fedpeft_dist.tracking.run_directory import RunDirectory

CLASSES = 10
VIT = {
    "name": "vit_tiny_patch16_224",
    "pretrained": False,
    # The digits are stored as 8 x 8 pixels, so no resizing changes the test images.
    "model_args": {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "drop_path_rate": 0.1},
}
RESNET = {"name": "resnet10t", "model_args": {"stem_width": 8, "channels": [8, 8, 8, 8]}}
CONVNEXT = {"name": "convnext_atto", "model_args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}}
SWIN = {
    "name": "swin_tiny_patch4_window7_224",
    "model_args": {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4},
}
LORA = {"name": "lora", "rank": 3, "alpha": 5.0, "dropout": 0.1}
ALL_TARGETS = {**LORA, "targets": ["qkv", "proj", "fc1", "fc2"]}
PARTS = {**LORA, "targets": ["q", "v", "fc1"], "ranks": {"v": 2, "fc1": 4}, "rslora": True}
DORA = {**LORA, "name": "dora", "targets": ["qkv", "fc2"], "ranks": {"fc2": 2}}
VERA = {"name": "vera", "rank": 6, "projection_seed": 5}

DIGITS = {"name": "digits"}

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """train(method, backbone, image_size): the directory of a finished run, trained once a module."""
    runs: dict[str, Path] = {}

    def run(method: dict[str, Any], backbone: dict[str, Any] = VIT, image_size: int = 8, data: Any = DIGITS) -> Path:
        key = json.dumps([method, backbone, image_size, data])
        if key not in runs:
            folder = tmp_path_factory.mktemp("run")
            tree = {
                "backbone": {"pretrained": False, **backbone},
                "method": method,
                "data": {"image_size": image_size, "clients": 4, "partition": {"name": "iid"}, **data},
                "federation": {"rounds": 1, "cohort": 2},
                "client": {"steps": 20, "batch_size": 32, "optimizer": {"name": "sgd", "lr": 0.1}},
                "runtime": {"device": "cpu", "lanes": 2, "precision": "fp32"},
                "output": {"root": str(folder), "name": "run"},
            }
            (folder / "config.yaml").write_text(yaml.safe_dump(tree))
            cli.app(["train", str(folder / "config.yaml")], standalone_mode=False)
            runs[key] = folder / "run"
        return runs[key]

    return run


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """command("export", ...): what it prints, line by line."""

    def run(*arguments: object) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["fedpeft", *map(str, arguments)])
        capsys.readouterr()
        cli.main()
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """refused("export", ...): the one error line."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["fedpeft", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capsys.readouterr()
        assert caught.value.code == 2
        assert output.out == ""
        (line,) = output.err.splitlines()
        assert line.startswith("error: ")
        return line

    return run


def reload(lines: list[str]) -> nn.Module:
    """Evaluates the command's expression without anything of this package."""
    expression = lines[-1].removeprefix("reload:").strip()
    return eval(expression, {"timm": timm, "PeftModel": PeftModel, "safetensors": safetensors})


def logits_of_run(run: Path, images: torch.Tensor) -> torch.Tensor:
    """[B, K] from images [B, C, H, W], by the run's own model."""
    directory = RunDirectory(run)
    model = build_lane_model(load_config(directory.config_file), CLASSES)
    trained, _ = directory.read_trainable()
    freeze(model.backbone.model, torch.float32, torch.device("cpu"))
    parameters = LaneParameters(model.layout, num_lanes=1, with_grad=False)
    parameters.load(0, model.layout.pad(model.layout.join(trained)))
    model.bind(parameters)
    with torch.no_grad():
        return model.logits(images.unsqueeze(0)).squeeze(0)


def random_images(channels: int = 3, side: int = 8) -> torch.Tensor:
    return torch.randn(6, channels, side, side, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def assert_same_function(model: nn.Module, run: Path, channels: int = 3, side: int = 8) -> None:
    assert not model.training
    images = random_images(channels, side)
    expected = logits_of_run(run, images)
    assert expected.std() > 0.01
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def accuracy(model: nn.Module, config: dict[str, Any], channels: int = 3, side: int = 8) -> float:
    """The accuracy on the test digits, prepared as the export says."""
    digits = load_digits()
    _, test = train_test_split(range(len(digits.target)), test_size=500, stratify=digits.target, random_state=0)
    images = torch.from_numpy(digits.images[test]).mul(255 / 16).round().float().unsqueeze(1) / 255
    if side != 8:
        images = nn.functional.interpolate(images, (side, side), mode=config["interpolation"], antialias=True)
        images = images.clamp(0, 1)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    images = ((images - mean) / std).expand(-1, channels, -1, -1)
    return (model(images).argmax(1) == torch.from_numpy(digits.target[test])).sum().item() / len(test)


def final_accuracy(run: Path) -> float:
    return json.loads((run / "summary.json").read_text())["final_accuracy"]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# --- timm --------------------------------------------------------------------------------------------------------


METHODS = [
    {"name": "full"},
    {"name": "head"},
    {"name": "bias"},
    {"name": "norm"},
    LORA,
    ALL_TARGETS,
    {"name": "partial"},
    PARTS,
    {"name": "ssf"},
    {"name": "ia3"},
    DORA,
    VERA,
    {"name": "fact_tt", "rank": 3},
    {"name": "fact_tk", "rank": 3},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method['name']}{len(method)}")
def test_plain_timm_computes_the_same_as_the_run(train: Train, command: Any, method: dict[str, Any]) -> None:
    run = train(method)
    lines = command("export", run, "--format", "timm")
    folder = run / "export" / "timm"
    assert lines == [
        f"written: {folder}",
        f"reload:  timm.create_model('local-dir:{folder}', pretrained=True).eval()",
    ]
    assert files(folder) == {"model.safetensors", "config.json", "README.md"}
    model = reload(lines)
    assert_same_function(model, run)
    assert accuracy(model, model.pretrained_cfg) == final_accuracy(run)
    assert not torch.equal(model.head.weight, torch.zeros_like(model.head.weight))


def test_timm_knows_how_the_images_are_prepared(train: Train, command: Any) -> None:
    model = reload(command("export", train({"name": "head"}), "--format", "timm"))
    found = timm.data.resolve_model_data_config(model)
    assert found["input_size"] == (3, 8, 8)
    assert list(found["mean"]) == list(found["std"]) == [0.5] * 3
    assert (found["interpolation"], found["crop_pct"], found["crop_mode"]) == ("bicubic", 1.0, "squash")
    assert model.num_classes == CLASSES


def test_the_embedded_backbone_is_rebuilt_without_this_package(train: Train, command: Any, tmp_path: Path) -> None:
    """In a process of its own, which never imports it."""
    run = train(ALL_TARGETS, {"name": "glyph_vit", "pretrained": True}, 32)
    lines = {name: command("export", run, "--format", name, "--output", tmp_path / name) for name in ("timm", "peft")}
    torch.save(random_images(1, 32), tmp_path / "images.pt")
    script = f"""
import sys, timm, torch
images = torch.load("images.pt")
with torch.no_grad():
    timm_logits = {lines["timm"][-1].removeprefix("reload:").strip()}(images)
    from peft import PeftModel
    peft_logits = {lines["peft"][-1].removeprefix("reload:").strip()}(images)
torch.save([timm_logits, peft_logits], "logits.pt")
assert "fedpeft_dist" not in sys.modules
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, timeout=300)
    expected = logits_of_run(run, random_images(1, 32))
    for logits in torch.load(tmp_path / "logits.pt"):
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for name, source in (("timm", "timm/config.json"), ("peft", "peft/base/config.json")):
        config = json.loads((tmp_path / source).read_text())["pretrained_cfg"]
        assert config["interpolation"] == "bilinear"
        assert accuracy(reload(lines[name]), config, 1, 32) == final_accuracy(run)


@pytest.fixture(scope="module")
def used_resnet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A ResNet whose batch-norm statistics are not those of a fresh one."""
    model = timm.create_model("resnet10t", num_classes=3, **RESNET["model_args"])
    generator = torch.Generator().manual_seed(4)
    for name, tensor in model.state_dict().items():
        if "running" in name:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    path = tmp_path_factory.mktemp("weights") / "resnet.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    return {**RESNET, "checkpoint": str(path)}


@pytest.mark.parametrize("method", ["full", "head", "bias", "norm"])
def test_batch_norm_statistics_go_along(train: Train, command: Any, used_resnet: dict[str, Any], method: str) -> None:
    run = train({"name": method}, used_resnet, 32)
    model = reload(command("export", run, "--format", "timm"))
    stored = safetensors.torch.load_file(used_resnet["checkpoint"])
    assert torch.equal(model.bn1.running_mean, stored["bn1.running_mean"])
    assert_same_function(model, run, side=32)


@pytest.mark.parametrize(
    ("backbone", "method"),
    [(CONVNEXT, {"name": "norm"}), (CONVNEXT, {"name": "bias"}), (SWIN, ALL_TARGETS), (SWIN, {"name": "full"})],
    ids=lambda value: value["name"],
)
def test_other_families(train: Train, command: Any, backbone: dict[str, Any], method: dict[str, Any]) -> None:
    run = train(method, backbone, 32)
    assert_same_function(reload(command("export", run, "--format", "timm")), run, side=32)


def test_a_tag_and_arguments_are_kept(train: Train, command: Any) -> None:
    """The tag names other data statistics; the arguments change the shapes."""
    arguments = {**VIT["model_args"], "in_chans": 1, "pretrained_cfg_overlay": {"interpolation": "bilinear"}}
    run = train({"name": "bias"}, {"name": "vit_base_patch16_224.mae", "model_args": arguments})
    model = reload(command("export", run, "--format", "timm"))
    assert_same_function(model, run, channels=1)
    config = model.pretrained_cfg
    assert config["interpolation"] == "bilinear"
    assert config["mean"] == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    assert accuracy(model, config, 1) == final_accuracy(run)


def test_lora_is_merged_in_double_precision(train: Train) -> None:
    directory = RunDirectory(train(ALL_TARGETS))
    run = load_run(load_config(directory.config_file), directory)
    merged = run.method.merge(run.frozen, run.trained)
    assert merged.keys() == run.frozen.keys()
    changed = [name for name in merged if not torch.equal(merged[name], run.frozen[name])]
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert set(changed) == {f"blocks.{i}.{part}.weight" for i in (0, 1) for part in parts} | {
        "head.weight",
        "head.bias",
    }
    for name in set(changed) - {"head.weight", "head.bias"}:
        layer = name.removesuffix(".weight")
        a, b = (run.trained[f"{layer}.lora_{letter}.weight"].double() for letter in "AB")
        expected = (run.frozen[name].double() + 5.0 / 3 * (b @ a)).float()
        assert torch.equal(merged[name], expected)


def test_an_export_is_a_checkpoint_for_another_run(train: Train, command: Any, tmp_path: Path) -> None:
    run = train(ALL_TARGETS)
    command("export", run, "--format", "timm", "--output", tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    again = train({"name": "head"}, {**VIT, "checkpoint": str(weights)})
    assert (
        safetensors.torch.load_file(weights).keys()
        == load_run(load_config(RunDirectory(again).config_file), RunDirectory(again)).frozen.keys()
    )


# --- how images are prepared ---------------------------------------------------------------------------------------

SIZES = {
    "equal": [(60, 20)],
    "wide": [(60, 20), (72, 20), (61, 18)],
    "tall": [(20, 60), (20, 75)],
    "one odd": [(20, 20)],
}


def write_pictures(root: Path, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """Two classes: a red or a green middle, between noise on both sides. Returns the config's section."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 12)):
        for channel, name in enumerate(("red", "green")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                width, height = sizes[number % len(sizes)]
                pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                middle = pixels[height // 2 - 9 : height // 2 + 9, width // 2 - 9 : width // 2 + 9]
                middle[...] = 40
                middle[..., channel] = 220
                Image.fromarray(pixels).save(root / split / name / f"{number:02d}.png")
    return {"name": "image_folder", "root": str(root), "stored_size": 16}


@pytest.fixture(params=SIZES)
def pictures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """(crop mode, data section)."""
    root = tmp_path_factory.getbasetemp() / f"pictures {request.param}"
    if not root.exists():
        write_pictures(root, SIZES[request.param])
        if request.param == "one odd":
            Image.new("RGB", (21, 20)).save(root / "train" / "red" / "odd.png")
    data = {"name": "image_folder", "root": str(root), "stored_size": 16}
    return "squash" if request.param == "equal" else "center", data


def test_pictures_prepared_as_the_export_says_equal_those_of_the_run(
    train: Train, command: Any, pictures: tuple[str, dict[str, Any]]
) -> None:
    crop_mode, data = pictures
    run = train({"name": "full"}, data=data)
    model = reload(command("export", run, "--format", "timm"))
    found = timm.data.resolve_model_data_config(model)
    assert (found["crop_mode"], found["crop_pct"], found["input_size"]) == (crop_mode, 1.0, (3, 8, 8))
    transform = timm.data.create_transform(**found)
    files = sorted(Path(data["root"]).glob("test/*/*.png"), key=lambda path: (path.parent.name, path.name))
    prepared = torch.stack([transform(Image.open(path).convert("RGB")) for path in files])

    config = load_config(RunDirectory(run).config_file)
    dataset = load_dataset(config.data, 1)
    store = DeviceStore(
        dataset.test, make_transform(config.data, "bicubic"), 3, (0.5,) * 3, (0.5,) * 3, torch.device("cpu")
    )
    seen, labels = store.batch(torch.arange(len(files)).unsqueeze(0))
    assert (prepared - seen[0]).abs().mean() < 0.05  # of a range of 2
    with torch.no_grad():
        accuracy = (model(prepared).argmax(1) == labels[0]).float().mean().item()
    assert accuracy == pytest.approx(final_accuracy(run))
    assert accuracy > 0.9


def test_an_export_of_8_bit_training_has_the_float_weights_and_says_so(
    train: Train, command: Any, tmp_path: Path
) -> None:
    run, texts, models = train(LORA), [], []
    for quantize in ("none", "int8"):
        folder = tmp_path / quantize
        key = f"runtime.sharding.quantize={quantize}"
        models.append(reload(command("export", run, key, "--format", "timm", "--output", folder)).state_dict())
        texts.append((folder / "README.md").read_text())
    assert ["rounded to 8 bits" in text for text in texts] == [False, True]
    assert all(torch.equal(models[0][name], tensor) for name, tensor in models[1].items())


def test_every_format_tells_how_images_are_prepared(train: Train, command: Any, tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "pictures", SIZES["wide"])
    run = train(LORA, data=data)
    expected = {"input_size": (3, 8, 8), "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}
    for export_format, file in {
        "timm": None,
        "peft": "adapter_model.safetensors",
        "safetensors": "trainable.safetensors",
    }.items():
        command("export", run, "--format", export_format)
        folder = run / "export" / export_format
        text = (folder / "README.md").read_text()
        assert "resized on the shorter side to 8 (bicubic), cropped to the central 8 x 8" in text
        if file is None:
            continue
        with safe_open(folder / file, framework="pt") as tensors:
            assert tensors.metadata()["crop_mode"] == "center"
        (line,) = [line for line in text.splitlines() if "create_transform" in line]
        found = eval(line.partition("=")[2], {"timm": SimpleNamespace(data=SimpleNamespace(create_transform=dict))})
        assert found.items() >= expected.items()
        assert found["mean"] == found["std"] == (0.5,) * 3


def test_exports_a_run_without_a_recipe_of_its_images(
    train: Train, command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older versions wrote no recipe. The export warns only if the images may have had several sizes."""
    runs = [train(LORA), train(LORA, data=write_pictures(tmp_path / "pictures", SIZES["equal"]))]
    for number, (run, warned) in enumerate(zip(runs, (False, True))):
        old = copy_run(run, tmp_path / str(number))
        tensors, metadata = RunDirectory(run).read_trainable()
        for key in ("image_size", "interpolation", "crop_mode", "mean", "std", "upright"):
            del metadata[key]
        RunDirectory(old).write_trainable(tensors, metadata)
        monkeypatch.setattr(sys, "argv", ["fedpeft", "export", str(old), "--format", "timm"])
        capsys.readouterr()
        cli.main()
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == warned
        if warned:
            assert lines[0].startswith(f"warning: {old / 'trainable.safetensors'}: does not say how images")
        assert "resized whole to 8 x 8 (bicubic)" in (old / "export" / "timm" / "README.md").read_text()


# --- peft --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "method", "side"),
    [
        (VIT, LORA, 8),
        (VIT, ALL_TARGETS, 8),
        (SWIN, ALL_TARGETS, 32),
        (VIT, PARTS, 8),
        (VIT, {"name": "ia3"}, 8),
        (VIT, DORA, 8),
        (VIT, VERA, 8),
        (SWIN, VERA, 32),
        (VIT, {"name": "norm"}, 8),
        (CONVNEXT, {"name": "norm"}, 32),
        (RESNET, {"name": "norm"}, 32),
    ],
    ids=[
        "qkv",
        "all targets",
        "swin",
        "parts",
        "ia3",
        "dora",
        "vera",
        "vera swin",
        "norm",
        "norm of stages",
        "batch norm",
    ],
)
def test_plain_peft_computes_the_same_as_the_run(
    train: Train, command: Any, backbone: dict[str, Any], method: dict[str, Any], side: int
) -> None:
    run = train(method, backbone, side)
    lines = command("export", run, "--format", "peft")
    folder = run / "export" / "peft"
    assert files(folder) == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
        "base/model.safetensors",
        "base/config.json",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns of what it does not find
        warnings.filterwarnings("ignore", "Unsupported layer type")  # it says so of every norm
        model = reload(lines)
        own = get_peft_model_state_dict(model)
    assert_same_function(model, run, side=side)
    written = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    assert written.keys() == own.keys()
    assert all(torch.equal(written[name], own[name]) for name in own)
    merged = model.merge_and_unload()
    assert_same_function(merged, run, side=side)
    if side == 8:
        config = json.loads((folder / "base" / "config.json").read_text())["pretrained_cfg"]
        assert accuracy(merged, config) == final_accuracy(run)


def test_lora_on_an_attention_that_reads_the_weight_itself_goes_to_timm_and_not_to_peft(
    train: Train, command: Any, refused: Any
) -> None:
    """BEiT adds its biases to `qkv.weight @ x` and never calls the layer that peft would put in its place."""
    arguments = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    run = train(LORA, {"name": "beit_base_patch16_224", "model_args": arguments})
    assert_same_function(reload(command("export", run, "--format", "timm")), run)
    line = refused("export", run, "--format", "peft")
    assert "--format peft: Beit reads the weight of qkv itself" in line
    assert not (run / "export" / "peft").exists()


def test_peft_adapts_the_trained_layers_and_no_other(train: Train, command: Any) -> None:
    model = reload(command("export", train(LORA), "--format", "peft"))
    config = model.peft_config["default"]
    assert set(config.target_modules) == {"blocks.0.attn.qkv", "blocks.1.attn.qkv"}
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 5, 0.1)
    assert config.modules_to_save == ["head"]
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {f"base_model.model.blocks.{i}.attn.qkv" for i in (0, 1)}


def test_weights_that_timm_has_are_not_copied(
    train: Train, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export names the base model. Here timm finds it in a cache of the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "models--timm--test_vit.r160_in1k", "a" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    weights = timm.create_model("test_vit", num_classes=1000).state_dict()
    safetensors.torch.save_file(weights, repository / "snapshots" / commit / "model.safetensors")
    run = train(LORA, {"name": "test_vit.r160_in1k", "pretrained": True, "model_args": {"drop_path_rate": 0.1}}, 32)
    lines = command("export", run, "--format", "peft")
    assert files(run / "export" / "peft") == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    base = "timm.create_model('test_vit.r160_in1k', pretrained=True, num_classes=10, drop_path_rate=0.1, img_size=32)"
    assert base in lines[-1]
    assert_same_function(reload(lines), run, side=32)


# --- safetensors -------------------------------------------------------------------------------------------------


PROMPT, ADAPTER = {"name": "prompt", "tokens": 2}, {"name": "adapter", "bottleneck": 4}


@pytest.mark.parametrize("method", [*METHODS[:5], PROMPT, ADAPTER], ids=lambda method: method["name"])
def test_the_files_metadata_describes_the_tensors(train: Train, command: Any, method: dict[str, Any]) -> None:
    run = train(method)
    lines = command("export", run, "--format", "safetensors")
    trained, metadata = RunDirectory(run).read_trainable()
    tensors = reload(lines)
    assert tensors.keys() == trained.keys()
    assert all(torch.equal(tensors[name], trained[name]) for name in trained)
    with safe_open(run / "export" / "safetensors" / "trainable.safetensors", framework="pt") as file:
        told = file.metadata()
    assert told["backbone_sha256"] == metadata["backbone_sha256"]
    assert told["weights_sha256"] == metadata["weights_sha256"]
    assert json.loads(told["method"]).items() >= method.items()
    assert json.loads(told["backbone"])["name"] == VIT["name"]
    assert json.loads(told["classes"]) == CLASSES
    assert json.loads(told["mean"]) == json.loads(told["std"]) == [0.5] * 3
    assert (json.loads(told["image_size"]), told["interpolation"]) == (8, "bicubic")


# --- load_model and programs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS, PROMPT, ADAPTER], ids=lambda method: f"{method['name']}{len(method)}")
def test_load_model_computes_the_same_as_the_run(train: Train, method: dict[str, Any]) -> None:
    run = train(method)
    model = fedpeft_dist.load_model(str(run))
    assert_same_function(model, run)
    again = fedpeft_dist.load_model(run)
    with torch.no_grad():
        for tensor in again.state_dict().values():
            tensor.zero_()
    again.load_state_dict(model.state_dict())
    assert_same_function(again, run)
    pictures = [Image.fromarray(digit.astype("uint8") * 15) for digit in load_digits().images[:3]]
    images = torch.stack([model.transform(picture) for picture in pictures])
    assert images.shape == (3, 3, 8, 8)
    assert model(images).shape == (3, CLASSES)


@pytest.mark.parametrize("upright", [True, False])
def test_a_picture_is_turned_and_prepared_as_the_run_did(upright: bool) -> None:
    transform = ImageRecipe(32, 1, "bilinear", "squash", (0.5,), (0.5,), upright).transform()
    pixels = torch.arange(6 * 32, dtype=torch.uint8).view(6, 32).numpy()
    picture = Image.fromarray(pixels).convert("RGB")
    picture.getexif()[ExifTags.Base.Orientation] = 3  # upside down
    prepared = transform(picture)
    assert prepared.shape == (1, 32, 32)
    assert (prepared[0, 0, 0] > prepared[0, -1, -1]) == upright
    assert prepared.abs().max() == 1


def test_programs_are_written_and_loaded_by_the_printed_line(train: Train, command: Any) -> None:
    run = train(PROMPT)
    command("export", run, "--format", "torch")
    lines = command("export", run, "--format", "torch")  # it takes the older one's place
    assert files(run / "export" / "torch") == {"model.pt2", "README.md"}
    program = eval(lines[-1].removeprefix("reload:").strip(), {"torch": torch})
    expected = logits_of_run(run, random_images())
    torch.testing.assert_close(program(random_images()), expected, rtol=1e-5, atol=1e-5)
    lines = command("export", run, "--format", "onnx")
    assert files(run / "export" / "onnx") == {"model.onnx", "README.md"}
    session = eval(lines[-1].removeprefix("reload:").strip(), {"onnxruntime": onnxruntime})
    (scores,) = session.run(None, {"images": random_images().numpy()})
    torch.testing.assert_close(torch.from_numpy(scores), expected, rtol=1e-5, atol=1e-5)


# --- mistakes ----------------------------------------------------------------------------------------------------


def test_formats_that_do_not_fit_are_refused_by_the_methods_name(train: Train, refused: Any) -> None:
    for method in (PROMPT, ADAPTER):
        line = refused("export", train(method), "--format", "timm")
        assert "--format timm" in line
        assert f"'{method['name']}'" in line
        assert line.endswith("give --format safetensors or torch or onnx")
    line = refused("export", train({"name": "bias"}), "--format", "peft")
    assert "'bias'" in line
    assert line.endswith("give --format timm or safetensors or torch or onnx")
    line = refused("export", train(LORA), "--format", "tflite")
    assert line.endswith("'tflite' is none of timm, peft, safetensors, torch, onnx")
    assert "--format" in refused("export", train(LORA))


def copy_run(run: Path, place: Path, *without: str) -> Path:
    place.mkdir()
    for name in {"config.yaml", "state.json", "trainable.safetensors"} - set(without):
        (place / name).write_bytes((run / name).read_bytes())
    return place


def test_refuses_runs_that_cannot_be_exported(train: Train, refused: Any, tmp_path: Path) -> None:
    run, other = train(LORA), train(ALL_TARGETS)
    (tmp_path / "file").touch()
    for place in (tmp_path / "absent", tmp_path / "file", tmp_path):
        assert "no run's directory" in refused("export", place, "--format", "timm")
    unfinished = copy_run(run, tmp_path / "unfinished", "trainable.safetensors")
    (unfinished / "state.json").write_text('{"state": "interrupted", "next_round": 3, "launch": ""}')
    line = refused("export", unfinished, "--format", "timm")
    assert "the run is interrupted" in line
    assert f"`fedpeft train {unfinished / 'config.yaml'}`" in line
    begun = copy_run(run, tmp_path / "begun", "trainable.safetensors", "state.json")
    assert "has not begun" in refused("export", begun, "--format", "timm")

    damaged = copy_run(run, tmp_path / "damaged")
    (damaged / "trainable.safetensors").write_bytes(b"noise" * 9)
    assert "no trained parameters can be read" in refused("export", damaged, "--format", "timm")
    foreign = copy_run(run, tmp_path / "foreign")
    (foreign / "trainable.safetensors").write_bytes((other / "trainable.safetensors").read_bytes())
    assert "do not match the trainable parameters" in refused("export", foreign, "--format", "timm")
    assert "backbone of other weights" in refused("export", run, "seed=2", "--format", "timm")
    headless = copy_run(run, tmp_path / "headless")
    tensors, metadata = RunDirectory(run).read_trainable()
    del tensors["head.weight"]
    RunDirectory(headless).write_trainable(tensors, metadata)
    assert "do not match the trainable parameters: head.weight" in refused("export", headless, "--format", "timm")
    assert not any((place / "export").exists() for place in (unfinished, begun, damaged, foreign, headless))


def test_refuses_places_that_cannot_be_written(train: Train, refused: Any, tmp_path: Path) -> None:
    run = train(LORA)
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        line = refused("export", run, "--format", "timm", "--output", place)
        assert f"--output {place}" in line
        assert "is a file" in line
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_text("not from here")
    for place in (tmp_path / "mine", run):
        assert "holds other things" in refused("export", run, "--format", "timm", "--output", place)
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "mine" / "model.safetensors").read_text() == "not from here"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(train: Train, refused: Any, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert "is not writable" in refused("export", train(LORA), "--format", "timm", "--output", tmp_path / "new")
    finally:
        tmp_path.chmod(0o700)


def test_an_older_export_is_replaced_only_by_a_whole_one(
    train: Train, command: Any, refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "out"
    command("export", train(LORA), "--format", "peft", "--output", place)
    before = {name: (place / name).read_bytes() for name in files(place)}
    with monkeypatch.context() as patch:

        def full_disk(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(formats, "_write_json", full_disk)
        line = refused("export", train(LORA), "--format", "timm", "--output", place)
    assert f"--output {place}: cannot be written" in line
    assert "No space left" in line
    assert {name: (place / name).read_bytes() for name in files(place)} == before
    command("export", train(LORA), "--format", "timm", "--output", place)
    assert files(place) == {"model.safetensors", "config.json", "README.md"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_every_format_has_a_name_of_its_own() -> None:
    assert list(export.FORMATS) == ["timm", "peft", "safetensors", "torch", "onnx"]
