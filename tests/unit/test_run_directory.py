"""A run's directory: what is written comes back, and what is broken is named."""

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
from fedpeft_dist.tracking.run_directory import COMPLETE, INTERRUPTED, RunDirectory, read_json, read_metrics


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


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_others_may_read_what_the_umask_allows(tmp_path: Path, umask: int) -> None:
    """safetensors makes its files for the owner alone."""
    before = os.umask(umask)
    try:
        RunDirectory(tmp_path).write_trainable({"a": torch.zeros(2)}, {"backbone_sha256": "ab"})
    finally:
        os.umask(before)
    assert RunDirectory(tmp_path).trainable_file.stat().st_mode & 0o777 == 0o666 & ~umask
