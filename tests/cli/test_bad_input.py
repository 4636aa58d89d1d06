"""Every user's mistake ends with exit code 2 and one helpful `error:` line, and leaves nothing behind.

Most cases call the console script's function in this process; a few start the real command, one of them on two ranks.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from fedpeft_dist.config.load import load_config
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.methods import build_lane_model
from fedpeft_dist.tracking.run_directory import INTERRUPTED, RunDirectory

from .conftest import Fedpeft, Refuse, assert_tells, only_error_line, snapshot

TINY_VIT = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
CONFIG = {
    "backbone": {"name": "vit_tiny_patch16_224", "pretrained": False, "model_args": TINY_VIT},
    "method": {"name": "head"},
    "data": {"name": "digits", "image_size": 16, "clients": 4, "partition": {"name": "iid"}},
    "federation": {"rounds": 1, "cohort": 2},
    "client": {"epochs": 1, "batch_size": 32},
    "runtime": {"device": "cpu", "lanes": 2},
}
CONVNEXT = {"name": "convnext_atto", "model_args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}}
RESNET = {"name": "resnet10t", "model_args": {"stem_width": 8, "channels": [8, 8, 8, 8]}}
SWIN = {
    "name": "swin_tiny_patch4_window7_224",
    "model_args": {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4},
}


@pytest.fixture
def folder(folder: Path) -> Path:
    """The folder that the command runs in: it holds config.yaml, which would run."""
    write_config(folder)
    return folder


def write_config(folder: Path, **sections: Any) -> None:
    """Writes config.yaml: CONFIG with whole sections replaced."""
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | sections))


def first(case: Any) -> str | None:
    """Names a test after the first of its arguments or words."""
    return case[0] if isinstance(case, list) else None


# --- the configuration -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "cost", "partition"])
def test_unknown_key(refuse: Refuse, command: str) -> None:
    line = refuse(command, "config.yaml", "client.epoch=1")
    assert_tells(line, "config.yaml", "client.epoch: unknown key", "did you mean client.epochs?")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method.bottleneck=8"], ["method.bottleneck: unknown key", "name"]),
        (["federation.rounds=ten"], ["federation.rounds", "'ten'", "integer"]),
        (["backbone.pretrained=7"], ["backbone.pretrained", "7", "boolean"]),
        (["method.name=lorra"], ["method.name", "'lorra'", "did you mean lora?", "adapter", "prompt"]),
        (["backbone.model_args=null"], ["backbone.model_args", "None", "should be a mapping"]),
        (["client.optimizer.lr=-1"], ["client.optimizer.lr", "-1", "greater than 0"]),
        (["runtime.lanes=0"], ["runtime.lanes", "0", "'auto'", "greater than or equal to 1"]),
        (["rounds"], ["'rounds'", "key=value"]),
        (["federation.cohort=5"], ["federation.cohort: 5", "data.clients: 4", "at most 4"]),
    ],
    ids=first,
)
def test_refuses_values(refuse: Refuse, overrides: list[str], words: list[str]) -> None:
    assert_tells(refuse("train", "config.yaml", *overrides), *words)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("confg.yaml", None, ["confg.yaml", "no such config file", "did you mean config.yaml?"]),
        ("folder.yaml", "", ["folder.yaml", "directory"]),
        ("syntax.yaml", "a: [1\n\nb: }", ["syntax.yaml", "not valid YAML"]),
        ("list.yaml", "- seed", ["list.yaml", "mapping", "list"]),
        ("orphan.yaml", "extends: gone.yaml", ["gone.yaml", "no such config file"]),
    ],
)
def test_config_file(refuse: Refuse, folder: Path, name: str, content: str | None, words: list[str]) -> None:
    if content:
        (folder / name).write_text(content)
    elif content == "":
        (folder / name).mkdir()
    assert_tells(refuse("train", name), *words)


# --- the machine -------------------------------------------------------------------------------------------------


def test_precision_that_the_device_lacks(refuse: Refuse) -> None:
    assert_tells(refuse("train", "config.yaml", "runtime.precision=fp16"), "runtime.precision", "'fp16'", "fp32, bf16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_device_that_is_not_there(refuse: Refuse) -> None:
    assert_tells(refuse("train", "config.yaml", "runtime.device=cuda"), "runtime.device", "'cuda'", "cpu")


def test_output_root_that_is_a_file(refuse: Refuse) -> None:
    assert_tells(refuse("train", "config.yaml", "output.root=config.yaml"), "output.root", "config.yaml")


# --- participation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("participation", "words"),
    [
        ("{over_selection: 3}", ["over_selection: 3", "6 clients of a population of 4", "at most 2"]),
        ("{dropout: {name: trace, path: gone.csv}}", ["dropout.path: 'gone.csv'", "No such file"]),
        ("{availability: {name: trace, path: config.yaml}}", ["'config.yaml'", "client,start,end,available"]),
        ("{devices: {name: lognormal}, deadline: 0.001}", ["deadline: 0.001", "met by no client", "give more"]),
    ],
    ids=["over-selection", "missing", "columns", "deadline"],
)
def test_participation(refuse: Refuse, participation: str, words: list[str]) -> None:
    line = refuse("train", "config.yaml", f"federation.participation={participation}")
    assert_tells(line, "federation.participation.", *words)


# --- data and its partition --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar100", "resisc45", "pcam"])
def test_data_that_cannot_be_read(refuse: Refuse, name: str) -> None:
    assert_tells(refuse("train", "config.yaml", f"data.name={name}"), "data.name", name)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.max_train=1298"], ["data.max_train: 1298", "1297"]),
        (["data.clients=1298"], ["data.clients: 1298", "1297"]),
        (["data.partition={name: dirichlet, min_samples: 400}"], ["data.partition.min_samples: 400", "1297"]),
        (
            ["data.partition={name: dirichlet, min_samples: 320, alpha: 0.01}"],
            ["data.partition.min_samples: 320", "data.partition.alpha: 0.01", "lower"],
        ),
        (
            ["data.partition={name: shards, classes_per_client: 325}"],
            ["data.partition.classes_per_client: 325", "the 10 classes"],
        ),
        (["data.partition.name=natural"], ["data.partition.name", "'natural'", "'digits'"]),
        (["data.partition.name=pool"], ["data.partition.name", "'pool'", "synthetic"]),
        (["data.clients=null"], ["data.clients", "natural"]),
        (["data.validation=0.0001"], ["data.validation: 0.0001"]),
        (["data.validation=0.5", "data.clients=1297"], ["data.validation: 0.5"]),
    ],
    ids=first,
)
@pytest.mark.parametrize("command", ["train", "partition"])
def test_partition_that_cannot_be(refuse: Refuse, command: str, overrides: list[str], words: list[str]) -> None:
    assert_tells(refuse(command, "config.yaml", *overrides), *words)


def test_more_clients_than_natural_ones(refuse: Refuse, folder: Path) -> None:
    data = {"name": "glyphs", "image_size": 16, "images_per_letter": 1, "clients": 3}
    write_config(folder, data=data | {"partition": {"name": "natural"}})
    assert_tells(refuse("train", "config.yaml"), "data.clients: 3", "natural clients", "null")
    line = refuse("train", "config.yaml", "data.clients=null", "federation.cohort=100000")
    assert_tells(line, "federation.cohort: 100000", "population")


# --- the backbone and the method ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "cost"])
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["backbone.name=vit_tinny_patch16_224"], ["backbone.name", "'vit_tinny_patch16_224'", "vit_tiny_patch16_224"]),
        (["backbone.name=zzz"], ["backbone.name", "'zzz'", "timm"]),
        (["backbone.name=vit_tiny_patch16_224.nosuch"], ["backbone", "nosuch"]),
        (["backbone.model_args.nosuch=1"], ["backbone", "nosuch"]),
        (["backbone.model_args.num_heads=5"], ["backbone", "num_heads"]),
        (["backbone.model_args.num_heads=0"], ["backbone", "num_heads"]),
        (["backbone.model_args.num_classes=5"], ["backbone", "num_classes"]),
    ],
    ids=first,
)
def test_backbone_that_cannot_be(refuse: Refuse, command: str, overrides: list[str], words: list[str]) -> None:
    assert_tells(refuse(command, "config.yaml", *overrides), *words)


@pytest.mark.parametrize("command", ["train", "cost"])
@pytest.mark.parametrize(
    ("backbone", "method", "words"),
    [
        (CONVNEXT, {"name": "lora", "targets": ["fc1"]}, ["method.targets", "'fc1'", "ConvNeXt"]),
        (RESNET, {"name": "lora"}, ["method.targets", "'qkv'", "ResNet"]),
        (RESNET, {"name": "adapter"}, ["method.name", "'adapter'", "ResNet"]),
        (RESNET, {"name": "prompt"}, ["method.name", "'prompt'", "ResNet"]),
        (SWIN, {"name": "prompt"}, ["method.name", "'prompt'", "SwinTransformer"]),
        (SWIN, {"name": "adapter"}, ["method.shared", "[16, 32]", "shared: false"]),
    ],
    ids=["lora-convnext", "lora-resnet", "adapter-resnet", "prompt-resnet", "prompt-swin", "shared-adapter-swin"],
)
def test_method_that_does_not_fit(
    refuse: Refuse, folder: Path, command: str, backbone: dict[str, Any], method: dict[str, Any], words: list[str]
) -> None:
    write_config(
        folder,
        backbone=backbone | {"pretrained": False},
        method=method,
        data=CONFIG["data"] | {"image_size": 32},
    )
    assert_tells(refuse(command, "config.yaml"), *words)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"backbone": {"name": "glyph_vit"}}, ["backbone", "glyph_vit"]),
        ({"data": CONFIG["data"] | {"image_size": 4}}, ["data.image_size", "4"]),
        (
            {
                "backbone": CONFIG["backbone"] | {"model_args": TINY_VIT | {"in_chans": 1}},
                "data": {"name": "synthetic", "image_size": 16, "clients": 4, "partition": {"name": "iid"}},
            },
            ["3 channels", "backbone of 1", "in_chans: 3"],
        ),
        (
            {"backbone": CONFIG["backbone"] | {"model_args": TINY_VIT | {"attn_drop_rate": 0.1}}},
            ["backbone.model_args", "attn_drop_rate: 0.0"],
        ),
    ],
    ids=["weights of another size", "smaller than a patch", "colour", "attention dropout"],
)
def test_backbone_that_does_not_fit_the_images(
    refuse: Refuse, folder: Path, sections: dict[str, Any], words: list[str]
) -> None:
    write_config(folder, **sections)
    assert_tells(refuse("train", "config.yaml"), *words)


# --- checkpoints -------------------------------------------------------------------------------------------------


class Payload:
    """Unpickling it would make a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


def tiny_weights(**arguments: Any) -> dict[str, torch.Tensor]:
    return timm.create_model("vit_tiny_patch16_224", img_size=16, **TINY_VIT | arguments).state_dict()


def write_truncated_safetensors(path: Path) -> None:
    save_file(tiny_weights(), path)
    path.write_bytes(path.read_bytes()[:-1000])


def write_lacking_tensors(path: Path) -> None:
    weights = tiny_weights()
    save_file({name: weights[name] for name in weights if name != "blocks.0.attn.qkv.weight"}, path)


WEIGHTS = {
    "garbage.pth": lambda path: path.write_bytes(b"\x00garbage" * 50),
    "empty.pth": lambda path: path.write_bytes(b""),
    "no_state.pth": lambda path: torch.save([1, 2, 3], path),
    "payload.pth": lambda path: torch.save({"state_dict": Payload()}, path),
    "pickle.pth": lambda path: path.write_bytes(pickle.dumps(Payload())),
    "garbage.safetensors": lambda path: path.write_bytes(b"\xff" * 400),
    "empty.safetensors": lambda path: path.write_bytes(b""),
    "truncated.safetensors": write_truncated_safetensors,
    "lacking.safetensors": write_lacking_tensors,
    "wider.safetensors": lambda path: save_file(tiny_weights(embed_dim=64), path),
    "garbage.npz": lambda path: path.write_bytes(b"PK\x03\x04garbage" * 50),
    "others.npz": lambda path: np.savez(path, a=np.zeros(3)),
    "payload.npz": lambda path: np.savez(path, a=np.array([Payload()], dtype=object)),
    "folder.pth": lambda path: path.mkdir(),
    "weights.ckpt": lambda path: torch.save(tiny_weights(), path),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_checkpoint_that_cannot_be_loaded(refuse: Refuse, folder: Path, name: str) -> None:
    WEIGHTS[name](folder / name)
    line = refuse("train", "config.yaml", f"backbone.checkpoint={name}")
    assert_tells(line, "backbone.checkpoint", name)
    if name == "lacking.safetensors":
        assert_tells(line, "blocks.0.attn.qkv.weight")
    if name == "weights.ckpt":
        assert_tells(line, ".safetensors, .pth, .pth.tar, .pt, .bin, .npz")


def test_checkpoint_that_is_not_there(refuse: Refuse) -> None:
    line = refuse("train", "config.yaml", "backbone.checkpoint=weights/gone.safetensors")
    assert_tells(line, "backbone.checkpoint", "weights/gone.safetensors", "no such file")


# --- runs --------------------------------------------------------------------------------------------------------


def write_run(folder: Path, *overrides: str) -> tuple[RunDirectory, RunConfig]:
    """A run's directory as an interrupted run leaves it, without its checkpoints."""
    config = load_config(folder / "config.yaml", ["output.name=old", *overrides])
    run = RunDirectory(folder / "runs" / "old")
    run.write_config(config)
    run.write_state(INTERRUPTED, 1)
    run.lock().release()
    return run, config


def test_run_of_another_config(refuse: Refuse, folder: Path) -> None:
    write_run(folder)
    line = refuse("train", "config.yaml", "output.name=old", "seed=2", "client.epochs=3")
    assert_tells(line, "old", "seed (1 there, 2 here)", "client.epochs (1 there, 3 here)", "output.name")


def test_run_of_fewer_rounds(refuse: Refuse, folder: Path) -> None:
    write_run(folder, "federation.rounds=5")
    assert_tells(refuse("train", "config.yaml", "output.name=old"), "old", "federation.rounds (5 there, 1 here)")


def test_run_with_a_broken_config(refuse: Refuse, folder: Path) -> None:
    run, _ = write_run(folder)
    run.config_file.write_text("seed: [1")
    for arguments in (("train", "config.yaml", "output.name=old"), ("evaluate", "runs/old")):
        assert_tells(refuse(*arguments), "runs/old/config.yaml", "not valid YAML")


@pytest.mark.parametrize("path", ["empty", "gone", "config.yaml"])
@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_no_run_there(refuse: Refuse, command: str, path: str) -> None:
    Path("empty").mkdir()
    assert_tells(refuse(command, path), f"{path}: no run's directory")


def test_evaluate_before_anything_is_trained(refuse: Refuse, folder: Path) -> None:
    write_run(folder)
    assert_tells(refuse("evaluate", "runs/old"), "trainable.safetensors")


@pytest.mark.parametrize("content", [b"", b"\xff" * 400])
def test_evaluate_of_broken_parameters(refuse: Refuse, folder: Path, content: bytes) -> None:
    run, _ = write_run(folder)
    run.trainable_file.write_bytes(content)
    assert_tells(refuse("evaluate", "runs/old"), "trainable.safetensors")


def test_evaluate_of_parameters_from_elsewhere(refuse: Refuse, folder: Path) -> None:
    run, _ = write_run(folder)
    save_file({"head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)}, run.trainable_file)
    assert_tells(refuse("evaluate", "runs/old"), "trainable.safetensors")


def test_evaluate_on_another_backbone(refuse: Refuse, folder: Path) -> None:
    run, _ = write_run(folder)
    run.write_trainable({"head.weight": torch.zeros(10, 32)}, {"backbone_sha256": "0" * 64})
    assert_tells(refuse("evaluate", "runs/old"), "trainable.safetensors", "other weights")


def test_evaluate_of_another_methods_parameters(refuse: Refuse, folder: Path) -> None:
    run, config = write_run(folder)
    digest = build_lane_model(config, num_classes=10).backbone.sha256
    run.write_trainable({"blocks.0.prompt": torch.zeros(10, 32)}, {"backbone_sha256": digest})
    assert_tells(refuse("evaluate", "runs/old"), "trainable.safetensors", "blocks.0.prompt", "head.weight")


@pytest.mark.parametrize("name", ["state.json", "summary.json"])
@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "7"])
def test_report_of_broken_files(refuse: Refuse, folder: Path, name: str, content: str) -> None:
    run, _ = write_run(folder)
    run.state_file.write_text(json.dumps({"state": "complete", "next_round": 1}))
    (run.path / name).write_text(content)
    assert_tells(refuse("report", "runs"), name)


def test_report_of_a_complete_run_without_summary(refuse: Refuse, folder: Path) -> None:
    run, _ = write_run(folder)
    run.write_state("complete", 1)
    assert_tells(refuse("report", "runs"), "summary.json")


# --- the command line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian", "config.yaml"], ["trian"]),
        (["train"], ["CONFIG"]),
        (["cost"], ["CONFIG"]),
        (["report"], ["DIR"]),
        (["report", "a", "b"], ["b"]),
        (["train", "config.yaml", "--jason"], ["--jason"]),
        (["cost", "config.yaml", "--jsn"], ["--jsn", "--json"]),
        (["partition", "config.yaml", "--picture"], ["--picture"]),
        (["partition", "config.yaml", "--picture=$NOWHERE/p.png"], ["'--picture'", "'$NOWHERE/p.png'", "no value"]),
        (["train", "~nobody-here/c.yaml"], ["'CONFIG'", "~nobody-here is no user's home folder"]),
        (["evaluate", "$NOWHERE"], ["'RUN'", "'NOWHERE' has no value"]),
        (["export", "runs/run", "--format=timm", "--output=~nobody-here/x"], ["'--output'", "~nobody-here"]),
        (["report", "$NOWHERE"], ["'DIR'", "'NOWHERE' has no value"]),
        (["sweep", "list", "$NOWHERE"], ["'SWEEP'", "'NOWHERE' has no value"]),
        (["pretrain", "--output=$NOWHERE"], ["'--output'", "'NOWHERE' has no value"]),
        (["train", "config.yaml", f"output.name={'x' * 256}"], ["output.name", "256 bytes", "200"]),
        (["train", "config.yaml", "output.name=''"], ["output.name: ''", "null"]),
    ],
    ids=first,
)
def test_arguments(refuse: Refuse, arguments: list[str], words: list[str]) -> None:
    assert_tells(refuse(*arguments), *words)


def test_paths_of_arguments_expand(fedpeft: Fedpeft, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("PICTURES", str(folder / "pictures"))
    code, out, err = fedpeft("partition", "~/config.yaml", "--picture=$PICTURES/p.png")
    assert (code, err) == (0, "")
    assert out.endswith(f"picture: {folder}/pictures/p.png\n")
    assert (folder / "pictures" / "p.png").exists()


def test_an_existing_path_is_taken_as_it_is_written(fedpeft: Fedpeft, folder: Path) -> None:
    for name in ("a$NOWHERE", "~nobody-here"):
        (folder / name).mkdir()
        (folder / name / "config.yaml").write_bytes((folder / "config.yaml").read_bytes())
        code, out, err = fedpeft("cost", f"{name}/config.yaml")
        assert (code, err) == (0, "")
        assert out.startswith(f"{name}/config.yaml: ")


def test_no_arguments_print_the_help(fedpeft: Fedpeft) -> None:
    code, out, err = fedpeft()
    assert code in (0, 2)
    assert "train" in out + err
    assert "error: \n" not in err


@pytest.mark.parametrize("picture", ["picture.nosuch", "config.yaml/picture.png"])
def test_picture_that_cannot_be_written(refuse: Refuse, picture: str) -> None:
    assert_tells(refuse("partition", "config.yaml", "--picture", picture), picture)


# --- the real command --------------------------------------------------------------------------------------------


def run_command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs python with these arguments, without ranks and without the internet."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["federation.rounds=ten"], ["federation.rounds", "'ten'", "integer"]),
        (["backbone.pretrained=true"], ["backbone.pretrained", "'vit_tiny_patch16_224'", "backbone.checkpoint"]),
    ],
    ids=["value", "no internet"],
)
def test_real_command(folder: Path, overrides: list[str], words: list[str]) -> None:
    before = snapshot(folder)
    result = run_command(folder, "-m", "fedpeft_dist", "train", "config.yaml", *overrides)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert_tells(only_error_line(result.stderr), *words)
    assert snapshot(folder) == before


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_two_ranks_print_one_error(folder: Path) -> None:
    before = snapshot(folder)
    overrides = ["data.partition={name: shards, classes_per_client: 325}"]
    result = run_command(folder, *TORCHRUN, "-m", "fedpeft_dist", "train", "config.yaml", *overrides)
    assert result.returncode != 0
    told = "".join(line for line in result.stderr.splitlines(keepends=True) if line.startswith("error: "))
    assert_tells(only_error_line(told), "data.partition.classes_per_client: 325", "the 10 classes")
    assert "fedpeft_dist/" not in result.stderr, "a traceback"
    assert snapshot(folder) == before


def test_two_ranks_print_an_error_if_the_first_is_late(folder: Path) -> None:
    """torchrun ends all ranks as soon as one has failed: the rank that tells the mistake must come to it."""
    late = "import os, time; time.sleep(2 * (os.environ['RANK'] == '0')); from fedpeft_dist.cli import main; main()"
    (folder / "late.py").write_text(late)
    result = run_command(folder, *TORCHRUN, "late.py", "train", "config.yaml", "federation.rounds=ten")
    assert result.returncode != 0
    told = "".join(line for line in result.stderr.splitlines(keepends=True) if line.startswith("error: "))
    assert_tells(only_error_line(told), "federation.rounds", "'ten'")
