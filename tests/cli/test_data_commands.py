"""The commands over data sets of files, as a user runs them; each kind of mistake is one `error:` line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from tests.data_fixtures import run_tree, write_cifar100, write_image_folder
from tests.warm_process import run_fedpeft

from .conftest import Fedpeft, Refuse, assert_tells, only_error_line

ROOT = Path(__file__).parents[2]


def write_config(folder: Path, **data: object) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(run_tree(folder / "runs", **data)))


def test_train_evaluate_and_partition_over_one_store(folder: Path, fedpeft: Fedpeft) -> None:
    write_cifar100(folder / "data")
    write_config(folder, name="cifar100", augment="crop_flip", max_train=120)
    trained = run_fedpeft(folder, "train", "config.yaml")
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr == ""
    code, out, err = fedpeft("evaluate", "runs/run", "--json")
    assert (code, err) == (0, "")
    summary = json.loads((folder / "runs" / "run" / "summary.json").read_text())
    assert json.loads(out)["accuracy"] == pytest.approx(summary["final_accuracy"])
    written = folder / "runs" / "run" / "config.yaml"
    written.write_text(written.read_text().replace("precision: fp32", "precision: fp16"))
    assert fedpeft("evaluate", "runs/run", "runtime.precision=fp16", "runtime.device=cpu").code == 2
    assert fedpeft("evaluate", "runs/run", "runtime.device=cpu", "runtime.precision=fp32", "--json").out == out
    if not torch.cuda.is_available():  # as if it had been trained where there is a GPU
        assert fedpeft("evaluate", "runs/run", "--json").out == out
    code, _, err = fedpeft("partition", "config.yaml")
    assert code == 0, err
    stores = [path for path in (folder / "data" / ".store").iterdir() if path.is_dir()]
    assert len(stores) == 1


def test_prefetch_builds_the_store_and_says_where(folder: Path, fedpeft: Fedpeft) -> None:
    write_cifar100(folder / "data")
    write_config(folder, name="cifar100")
    code, out, err = fedpeft("prefetch", "config.yaml", "data.store=elsewhere")
    assert code == 0, err
    weights, data = out.splitlines()
    assert weights.endswith("nothing to download")
    assert (folder / data.split()[-1] / "meta.json").is_file()
    assert not (folder / "data" / ".store").exists()


def break_nothing(folder: Path) -> None:
    pass


def remove_file(folder: Path) -> None:
    (folder / "data" / "cifar-100-python" / "test").unlink()


def truncate_file(folder: Path) -> None:
    path = folder / "data" / "cifar-100-python" / "train"
    path.write_bytes(path.read_bytes()[:10_000])


def truncate_image(folder: Path) -> None:
    write_image_folder(folder / "images")
    path = folder / "images" / "test" / "bee" / "1.jpg"
    Image.new("RGB", (20, 12), (9, 99, 199)).save(path)
    path.write_bytes(path.read_bytes()[:-60])


def make_folders(folder: Path) -> None:
    write_image_folder(folder / "images")


@pytest.mark.parametrize(
    ("prepare", "data", "words"),
    [
        (break_nothing, {"root": "absent"}, ["cifar-100-python/train and 2 more", "data.root: 'absent'", "prefetch"]),
        (remove_file, {}, ["cifar-100-python/test", "data.root: 'data'", "fedpeft prefetch CONFIG"]),
        (truncate_file, {}, ["data.root", "cifar-100-python/train", "cannot be read"]),
        (break_nothing, {"store": "config.yaml/store"}, ["data.store", "config.yaml/store", "give data.store"]),
        (break_nothing, {"max_train": 201}, ["data.max_train: 201", "200"]),
        (truncate_image, {"name": "image_folder", "root": "images"}, ["test/bee/1.jpg", "cannot be read"]),
        (
            make_folders,
            {"name": "image_folder", "root": "images", "classes": 5},
            ["data.classes: 5", "has 2 (ape, bee)"],
        ),
        (
            make_folders,
            {"name": "image_folder", "root": "image"},
            ["data.root", "image/train", "folder for each class"],
        ),
        (break_nothing, {"name": "resisc45"}, ["data.name: 'resisc45'", "data/NWPU-RESISC45", "by hand"]),
        (break_nothing, {"name": "pcam"}, ["pcam/camelyonpatch_level_2_split_train_x.h5", "prefetch"]),
        (break_nothing, {"name": "huggingface", "path": "a/b"}, ["data.path: 'a/b'", "neither a folder", "prefetch"]),
    ],
)
def test_a_mistake_is_one_line(fedpeft: Fedpeft, folder: Path, prepare, data: dict, words: list[str]) -> None:
    write_cifar100(folder / "data")
    prepare(folder)
    write_config(folder, **{"name": "cifar100"} | data)
    code, _, err = fedpeft("train", "config.yaml")
    assert code == 2
    assert_tells(only_error_line(err), *words)
    assert not list(folder.rglob("*.building"))


def test_a_full_disk_is_one_line_and_the_next_run_works(tmp_path: Path) -> None:
    write_cifar100(tmp_path / "data")
    write_config(tmp_path, name="cifar100")
    command = ["prlimit", "--fsize=300000", sys.executable, "-m", "fedpeft_dist", "train", "config.yaml"]
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert refused.returncode == 2, refused.stderr
    words = ("data.store: 'data/.store'", "770,000 bytes are needed", "were free")
    assert_tells(only_error_line(refused.stderr), *words)
    assert not list(tmp_path.rglob("*.building"))
    done = run_fedpeft(tmp_path, "train", "config.yaml")
    assert done.returncode == 0, done.stderr


def test_a_failed_download_is_one_line(fedpeft: Fedpeft, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address is looked up by a proxy that is not there."""
    for name in ("https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    write_config(folder, name="cifar10")
    code, _, err = fedpeft("prefetch", "config.yaml")
    assert code == 2
    assert_tells(only_error_line(err), "data.name: 'cifar10'", "cannot be downloaded", "data.root: 'data'")
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_cost_of_folders_needs_their_names_only(refuse: Refuse, folder: Path, fedpeft: Fedpeft) -> None:
    for name in ("a", "b", "c"):
        (folder / "data" / "train" / name).mkdir(parents=True)
    write_config(folder, name="image_folder")
    code, _, err = fedpeft("cost", "config.yaml", "--json")
    assert code == 0, err
    assert_tells(refuse("cost", "config.yaml", "data.root=absent"), "data.root", "absent/train")
