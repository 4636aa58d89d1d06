"""A run's directory: what is written comes back, what is broken is named, another run is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import parse_config
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.tracking.run_directory import (
    COMPLETE,
    INTERRUPTED,
    RunDirectory,
    check_same_backbone,
    check_same_run,
    read_json,
    read_metrics,
)


def config_of(**tree: object) -> RunConfig:
    return parse_config(tree, "test")


def directory_with_rounds(path: Path, num_rounds: int) -> RunDirectory:
    directory = RunDirectory(path)
    for number in range(1, num_rounds + 1):
        directory.append_metrics({"round": number, "accuracy": None, "train_loss": 0.5 / number})
    return directory


def rounds_of(directory: RunDirectory) -> list[int]:
    return [row["round"] for row in read_metrics(directory.metrics_file)]


def test_metrics_come_back(tmp_path: Path) -> None:
    directory = directory_with_rounds(tmp_path, 3)
    rows = read_metrics(directory.metrics_file)
    assert rows[2] == {"round": 3, "accuracy": None, "train_loss": 0.5 / 3}
    assert len(directory.metrics_file.read_text().splitlines()) == 3


@pytest.mark.parametrize(("keep", "expected"), [(0, []), (2, [1, 2]), (5, [1, 2, 3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_rounds_that_are_run_again_are_cut(tmp_path: Path, keep: int, expected: list[int]) -> None:
    directory = directory_with_rounds(tmp_path, 5)
    directory.cut_metrics(keep)
    assert rounds_of(directory) == expected
    directory.append_metrics({"round": keep + 1})
    assert rounds_of(directory) == [*expected, keep + 1]


def test_there_may_be_nothing_to_cut(tmp_path: Path) -> None:
    RunDirectory(tmp_path).cut_metrics(0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [1, 5, 20])
def test_a_last_line_that_was_cut_short_is_ignored(tmp_path: Path, length: int) -> None:
    directory = directory_with_rounds(tmp_path, 3)
    with open(directory.metrics_file, "a") as file:
        file.write(json.dumps({"round": 4, "accuracy": 0.25})[:length])
    assert rounds_of(directory) == [1, 2, 3]
    directory.cut_metrics(3)
    directory.append_metrics({"round": 4})
    assert rounds_of(directory) == [1, 2, 3, 4]


def test_state_and_summary(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    assert directory.read_state() is None
    directory.write_state(INTERRUPTED, 3, "job")
    assert directory.read_state()["state"] == INTERRUPTED
    assert json.loads(directory.state_file.read_text()) == {"state": "interrupted", "next_round": 3, "launch": "job"}
    directory.write_state(COMPLETE, 5)
    assert directory.read_state()["state"] == COMPLETE
    directory.write_summary({"lanes": 4, "privacy": None})
    assert read_json(directory.summary_file) == {"lanes": 4, "privacy": None}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"complete"', b"\xff\xfe\x00{}"])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"state\.json"):
        read_json(path)


def test_a_missing_json_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"summary\.json: cannot be read"):
        read_json(tmp_path / "summary.json")


def test_the_config_comes_back(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    assert directory.stored_config() is None
    config = config_of(
        seed=3,
        method={"name": "lora", "rank": 4, "targets": ["qkv", "fc1"]},
        client={"optimizer": {"name": "sgd", "lr": 1e-7}},
        backbone={"model_args": {"depth": 2}},
    )
    directory.write_config(config)
    assert directory.stored_config() == config


def test_trained_parameters_come_back(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    tensors = {"head.weight": torch.randn(3, 4).T, "head.bias": torch.randn(3).requires_grad_()}
    directory.write_trainable(tensors, {"method": "head", "backbone_sha256": "ab"})
    found, metadata = directory.read_trainable()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert metadata == {"method": "head", "backbone_sha256": "ab"}


@pytest.mark.parametrize("content", [None, b"", b"noise" * 100])
def test_parameters_that_cannot_be_read_are_named(tmp_path: Path, content: bytes | None) -> None:
    directory = RunDirectory(tmp_path)
    if content is not None:
        directory.trainable_file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"trainable\.safetensors"):
        directory.read_trainable()


@pytest.mark.parametrize("metadata", [None, {"method": "head"}])
def test_parameters_that_name_no_backbone_are_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    directory = RunDirectory(tmp_path)
    save_file({"head.bias": torch.zeros(3)}, directory.trainable_file, metadata=metadata)
    with pytest.raises(ConfigError, match=r"trainable\.safetensors.*which backbone"):
        directory.read_trainable()


@pytest.mark.parametrize("content", ["{}", '{"next_round": 3}'])
def test_a_state_file_without_a_state_is_named(tmp_path: Path, content: str) -> None:
    directory = RunDirectory(tmp_path)
    directory.state_file.write_text(content)
    with pytest.raises(ConfigError, match=r"state\.json.*state"):
        directory.read_state()


def test_parameters_go_with_the_backbone_they_were_trained_on(tmp_path: Path) -> None:
    check_same_backbone("a" * 64, "a" * 64, tmp_path)
    with pytest.raises(ConfigError, match=rf"{tmp_path} .* \(sha256 a{{12}} there, b{{12}} here\)"):
        check_same_backbone("a" * 64, "b" * 64, tmp_path)


def test_the_same_run_may_go_on(tmp_path: Path) -> None:
    check_same_run(config_of(seed=1), config_of(seed=1), tmp_path)


def test_a_run_may_get_longer_but_not_shorter(tmp_path: Path) -> None:
    short, long = config_of(federation={"rounds": 10}), config_of(federation={"rounds": 20})
    check_same_run(short, long, tmp_path)
    with pytest.raises(ConfigError, match=r"federation\.rounds \(20 there, 10 here\)"):
        check_same_run(long, short, tmp_path)


@pytest.mark.parametrize(
    "neutral",
    [
        {"output": {"root": "elsewhere", "name": "x", "checkpoint_every": 5}},
        {"runtime": {"compile": True}},
        {"federation": {"evaluate_every": 7}},
    ],
    ids=str,
)
def test_what_changes_no_result_may_differ(tmp_path: Path, neutral: dict) -> None:
    check_same_run(config_of(), config_of(**neutral), tmp_path)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"seed": 2}, [r"seed \(1 there, 2 here\)"]),
        ({"runtime": {"lanes": 3}}, [r"runtime\.lanes \(auto there, 3 here\)"]),
        ({"runtime": {"threads": 2}}, [r"runtime\.threads"]),
        ({"runtime": {"precision": "bf16"}}, [r"runtime\.precision"]),
        ({"runtime": {"evaluate_batch": 8}}, [r"runtime\.evaluate_batch"]),
        ({"method": {"name": "head"}}, [r"method\.name \(bias there, head here\)"]),
        ({"method": {"name": "lora"}}, [r"method\.name", r"method\.rank \(None there, 8 here\)"]),
        ({"backbone": {"model_args": {"depth": 2}}}, [r"backbone\.model_args\.depth \(None there, 2 here\)"]),
        ({"client": {"optimizer": {"lr": 0.5}}, "seed": 9}, [r"client\.optimizer\.lr", r"seed"]),
        ({"federation": {"rounds": 60}, "seed": 9}, [r"seed"]),
    ],
    ids=str,
)
def test_another_run_is_refused_with_the_keys_that_differ(tmp_path: Path, change: dict, names: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check_same_run(config_of(), config_of(**change), tmp_path)
    assert str(tmp_path) in str(error.value)
    for name in names:
        error.match(name)
    if "federation" in change:
        assert "rounds" not in str(error.value)


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_others_may_read_what_the_umask_allows(tmp_path: Path, umask: int) -> None:
    """safetensors makes its files for the owner alone."""
    before = os.umask(umask)
    try:
        RunDirectory(tmp_path).write_trainable({"a": torch.zeros(2)}, {"backbone_sha256": "ab"})
    finally:
        os.umask(before)
    assert RunDirectory(tmp_path).trainable_file.stat().st_mode & 0o777 == 0o666 & ~umask
