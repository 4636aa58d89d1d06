"""Data sets of files on several ranks: one builds the store, and the trained weights do not depend on their number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.data_fixtures import run_tree, write_cifar100
from tests.real_runs import complete


def train(folder: Path, num_ranks: int, augment: str) -> dict:
    """Trains in a folder of its own, store included. Returns the run's summary."""
    output = folder / f"{augment}-{num_ranks}"
    output.mkdir()
    data = {"name": "cifar100", "root": str(folder / "data"), "store": str(output / "store"), "augment": augment}
    tree = run_tree(output, **data, max_train=150, crop_padding=2)
    (output / "config.yaml").write_text(yaml.safe_dump(tree))
    complete(output / "config.yaml", num_ranks)
    assert len([path for path in (output / "store").iterdir() if path.is_dir()]) == 1
    return json.loads((output / "run" / "summary.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("file_data")
    write_cifar100(folder / "data")
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> str:
    return train(folder, 1, "none")["weights_sha256"]


@pytest.mark.parametrize("augment", ["crop_flip", "resized_crop_flip"])
def test_two_ranks_train_what_one_trains(folder: Path, plain: str, augment: str) -> None:
    one, two = train(folder, 1, augment), train(folder, 2, augment)
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert one["weights_sha256"] == two["weights_sha256"] != plain
    assert one["final_accuracy"] == two["final_accuracy"]
