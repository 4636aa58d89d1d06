"""Readers of files, each on a small data set in the format that it has on disk, and what they say to damage."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.data import SOURCES, cifar, count_classes, image_store, load_dataset
from fedpeft_dist.data.datasets import Dataset
from fedpeft_dist.data.download import prefetch_data
from fedpeft_dist.data.image_files import EncodedImage, choose_form, decode_chunks
from fedpeft_dist.data.resisc45 import draw_split
from tests.data_fixtures import (
    data_config,
    dump,
    write_cifar10,
    write_cifar100,
    write_image_folder,
    write_pcam,
    write_resisc45,
)


def load(root: Path, name: str, **data: Any) -> Dataset:
    return load_dataset(data_config(name=name, root=str(root), **data), 1)


def refused(root: Path, name: str, *words: str, **data: Any) -> None:
    """The data set is refused in one line with these words, and leaves nothing half-written."""
    with pytest.raises(ConfigError) as caught:
        load(root, name, **data)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert not [path for path in root.glob(".store/*") if path.name.endswith(".building") or path.is_dir()]


def truncate(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


# --- CIFAR -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "write", "classes"), [("cifar10", write_cifar10, 10), ("cifar100", write_cifar100, 100)]
)
def test_cifar(tmp_path: Path, name: str, write: Any, classes: int) -> None:
    expected, dataset = write(tmp_path), load(tmp_path, name)
    for split, found in {"train": dataset.train, "test": dataset.test}.items():
        assert np.array_equal(found.images.numpy(), expected[split][0])
        assert np.array_equal(found.labels.numpy(), expected[split][1])
        assert found.images.dtype == torch.uint8
        assert found.labels.dtype == torch.int64
    assert dataset.class_names == tuple(f"class{k}" for k in range(classes))
    assert count_classes(data_config(name=name)) == classes


def test_missing_files_are_named_with_what_to_do(tmp_path: Path) -> None:
    refused(tmp_path, "cifar100", "cifar-100-python/train and 2 more", "data.root", str(tmp_path), "fedpeft prefetch")
    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    refused(tmp_path, "cifar10", "cifar-10-batches-py/data_batch_3 below", "fedpeft prefetch")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_batch_is_named(tmp_path: Path, share: float) -> None:
    write_cifar10(tmp_path)
    truncate(tmp_path / "cifar-10-batches-py" / "data_batch_2", share)
    refused(tmp_path, "cifar10", "data_batch_2' cannot be read")


def test_cifar_of_another_number_of_classes(tmp_path: Path) -> None:
    write_cifar100(tmp_path, num_classes=20)
    refused(tmp_path, "cifar100", "data.name: 'cifar100' means 100 classes", "meta' has 20")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({b"data": np.zeros((3, 3072), np.uint8), b"fine_labels": [0, 1]}, "[2, 3072]"),
        ({b"data": np.zeros((2, 3071), np.uint8), b"fine_labels": [0, 1]}, "[2, 3072]"),
        ({b"data": np.zeros((2, 3072), np.int64), b"fine_labels": [0, 1]}, "uint8"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0, 100]}, "the label 100; valid are 0 to 99"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [-1, 1]}, "the label -1"),
        ({b"data": np.zeros((0, 3072), np.uint8), b"fine_labels": []}, "no sample"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}, "fine_labels"),
        ([1, 2], "cannot be read"),
    ],
)
def test_a_batch_that_is_not_as_it_should_be(tmp_path: Path, content: Any, words: str) -> None:
    write_cifar100(tmp_path)
    (tmp_path / "cifar-100-python" / "test").write_bytes(pickle.dumps(content, protocol=3))
    refused(tmp_path, "cifar100", "cifar-100-python/test", words)


class Harmful:
    """Unpickled without care, this would run a command."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch harm",)


@pytest.mark.parametrize("content", [Harmful(), {b"data": Harmful()}, {b"data": np.array([Harmful()], dtype=object)}])
def test_a_pickle_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_cifar100(tmp_path)
    dump({b"x": content}, tmp_path / "cifar-100-python" / "train")
    refused(tmp_path, "cifar100", "cifar-100-python/train", "only arrays and plain types are allowed")
    assert not (tmp_path / "harm").exists()


def test_the_module_names_of_the_original_pickles_are_understood(tmp_path: Path) -> None:
    """numpy has moved its core since: the files name numpy.core.multiarray."""
    content = pickle.dumps({b"data": np.arange(6, dtype=np.uint8).reshape(2, 3)}, protocol=2)
    moved = re.sub(rb"numpy\._core\.multiarray", b"numpy.core.multiarray", content)
    assert b"numpy.core.multiarray" in moved
    (tmp_path / "batch").write_bytes(moved)
    assert cifar.load_plain(tmp_path / "batch")[b"data"].tolist() == [[0, 1, 2], [3, 4, 5]]


# --- PCam --------------------------------------------------------------------------------------------------------


def test_pcam(tmp_path: Path) -> None:
    expected, dataset = write_pcam(tmp_path), load(tmp_path, "pcam")
    for split, found in {"train": dataset.train, "test": dataset.test}.items():
        assert np.array_equal(found.images.numpy(), expected[split][0].transpose(0, 3, 1, 2))
        assert np.array_equal(found.labels.numpy(), expected[split][1])
    assert dataset.num_classes == 2


def test_pcam_in_pieces_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write_pcam(tmp_path)
    monkeypatch.setattr("fedpeft_dist.data.pcam.CHUNK", 7)
    assert np.array_equal(load(tmp_path, "pcam").train.images.numpy(), expected["train"][0].transpose(0, 3, 1, 2))


@pytest.mark.parametrize("kind", ["x", "y"])
def test_a_truncated_hdf5_file_is_named(tmp_path: Path, kind: str) -> None:
    write_pcam(tmp_path)
    truncate(tmp_path / "pcam" / f"camelyonpatch_level_2_split_test_{kind}.h5")
    refused(tmp_path, "pcam", f"split_test_{kind}.h5' cannot be read")


def test_pcam_damaged_in_the_middle(tmp_path: Path) -> None:
    """The file opens, and its compressed pixels do not unpack."""
    write_pcam(tmp_path)
    path = tmp_path / "pcam" / "camelyonpatch_level_2_split_train_x.h5"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4000] = bytes(4000)
    path.write_bytes(content)
    refused(tmp_path, "pcam", "split_train_x.h5' cannot be read")


def test_pcam_of_another_shape(tmp_path: Path) -> None:
    write_pcam(tmp_path)
    with h5py.File(tmp_path / "pcam" / "camelyonpatch_level_2_split_train_x.h5", "w") as file:
        file["x"] = np.zeros((30, 32, 32, 3), dtype=np.uint8)
    refused(tmp_path, "pcam", "split_train_x.h5", "[30, 96, 96, 3]")
    with h5py.File(tmp_path / "pcam" / "camelyonpatch_level_2_split_train_y.h5", "w") as file:
        file["z"] = np.zeros(3)
    refused(tmp_path, "pcam", "split_train_y.h5")


# --- RESISC45 ----------------------------------------------------------------------------------------------------


def test_resisc45_is_split_by_class_and_the_split_is_written_down(tmp_path: Path) -> None:
    folder = write_resisc45(tmp_path)
    config = data_config(name="resisc45", root=str(tmp_path))
    dataset = load_dataset(config, 1)
    assert torch.bincount(dataset.train.labels).tolist() == [4] * 45
    assert torch.bincount(dataset.test.labels).tolist() == [1] * 45
    store = image_store.store_folder(SOURCES[type(config)](config), config)
    lists = [(store / f"{split}.txt").read_text().splitlines() for split in ("train", "test")]
    assert sorted(lists[0] + lists[1]) == sorted(f"{p.parent.name}/{p.name}" for p in folder.rglob("*.jpg"))
    for names, split in zip(lists, (dataset.train, dataset.test)):
        for number in (0, 17, len(names) - 1):
            pixels = np.asarray(Image.open(folder / names[number])).transpose(2, 0, 1)
            assert np.array_equal(split.images[number].numpy(), pixels)
            assert dataset.class_names[split.labels[number]] == names[number].split("/")[0]


def test_the_split_depends_on_its_seed_alone(tmp_path: Path) -> None:
    files = {name: [f"{name}/{k:03d}.jpg" for k in range(20)] for name in "abc"}
    train, test = draw_split(files, 0.2, seed=3)
    assert draw_split(files, 0.2, seed=3) == (train, test)
    assert draw_split(files, 0.2, seed=4) != (train, test)
    assert [len(test), len(train)] == [12, 48]
    assert not set(train) & set(test)
    own = [[name[2:] for name in test if name[0] == letter] for letter in "abc"]
    assert own[0] != own[1] != own[2]


@pytest.mark.parametrize(("share", "size"), [(0.0, 5), (0.2, 1), (0.95, 5)])
def test_a_share_that_splits_nothing_off_is_refused(share: float, size: int) -> None:
    with pytest.raises(ConfigError, match=f"data.test_share: {share} .*'a', which has {size}"):
        draw_split({"a": [f"a/{k}.jpg" for k in range(size)]}, share, 0)


@pytest.mark.parametrize("with_folders", [True, False])
def test_resisc45_by_lists(tmp_path: Path, with_folders: bool) -> None:
    folder = write_resisc45(tmp_path, per_class=4)
    paths = sorted(folder.rglob("*.jpg"))
    names = [f"{path.parent.name}/{path.name}" if with_folders else path.name for path in paths]
    chosen = {"train": names[0::4] + names[1::4], "test": names[3::4]}
    keys = {}
    for split, own in chosen.items():
        (tmp_path / f"{split}.txt").write_text("\n".join(own[::-1]) + "\n\n")
        keys[f"{split}_list"] = str(tmp_path / f"{split}.txt")
    dataset = load(tmp_path, "resisc45", **keys)
    assert (len(dataset.train), len(dataset.test)) == (90, 45)
    pixels = np.asarray(Image.open(paths[3])).transpose(2, 0, 1)
    assert np.array_equal(dataset.test.images[0].numpy(), pixels)


def test_lists_that_do_not_fit(tmp_path: Path) -> None:
    folder = write_resisc45(tmp_path, per_class=2)
    names = sorted(f"{path.parent.name}/{path.name}" for path in folder.rglob("*.jpg"))
    keys = {f"{split}_list": str(tmp_path / f"{split}.txt") for split in ("train", "test")}

    def refuse(train: list[str], test: list[str], *words: str) -> None:
        (tmp_path / "train.txt").write_text("\n".join(train))
        (tmp_path / "test.txt").write_text("\n".join(test))
        refused(tmp_path, "resisc45", *words, **keys)

    refuse(names, names[1::2], "data.train_list and data.test_list", names[1], "45 images")
    refuse([*names[0::2], "scene_00/absent.jpg"], names[1::2], "data.train_list", "'scene_00/absent.jpg'")
    refuse(names[0::2], [*names[1::2], names[1]], "data.test_list", "1 image(s) twice")
    refuse(names[0::2], names[3::2], "data.test_list", "no image of class 'scene_00'")
    refuse([], names[1::2], "data.train_list", "no image of class 'scene_00' (45 such classes)")
    (tmp_path / "train.txt").unlink()
    refused(tmp_path, "resisc45", "data.train_list", "No such file", **keys)


def test_resisc45_refuses_other_folders(tmp_path: Path) -> None:
    refused(tmp_path, "resisc45", "data.name: 'resisc45'", "NWPU-RESISC45", "by hand")
    folder = write_resisc45(tmp_path, num_classes=44)
    refused(tmp_path, "resisc45", "data.name: 'resisc45' means 45 classes", "has 44")
    (folder / "scene_44").mkdir()
    refused(tmp_path, "resisc45", "scene_44' is a class folder without an image")


# --- class folders -----------------------------------------------------------------------------------------------


def test_images_of_one_size_keep_it(tmp_path: Path) -> None:
    write_image_folder(tmp_path, classes=("bee", "ape"))
    (tmp_path / "train" / "bee" / "notes.txt").write_text("no image")
    dataset = load(tmp_path, "image_folder", classes=2)
    assert dataset.class_names == ("ape", "bee")
    assert dataset.train.images.shape == (6, 3, 12, 20)
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    pixels = np.asarray(Image.open(tmp_path / "train" / "bee" / "0.png")).transpose(2, 0, 1)
    assert np.array_equal(dataset.train.images[3].numpy(), pixels)
    assert count_classes(data_config(name="image_folder", root=str(tmp_path))) == 2
    assert count_classes(data_config(name="image_folder", root="absent", classes=7)) == 7


def test_images_of_several_sizes_become_squares(tmp_path: Path) -> None:
    """As torchvision resizes on the shorter side and crops the centre of what Pillow has read."""
    from torchvision import transforms

    write_image_folder(tmp_path)
    gradient = np.add.outer(np.arange(40), np.arange(90)).astype(np.uint8)
    Image.fromarray(np.stack([gradient, gradient.max() - gradient, gradient], axis=-1)).save(
        tmp_path / "test" / "ape" / "wide.png"
    )
    dataset = load(tmp_path, "image_folder", stored_size=16)
    assert dataset.train.images.shape == (6, 3, 16, 16)
    shorter = transforms.Resize(16, transforms.InterpolationMode.BICUBIC)
    square = transforms.Compose([shorter, transforms.CenterCrop(16), transforms.PILToTensor()])
    expected = square(Image.open(tmp_path / "test" / "ape" / "wide.png"))
    assert torch.equal(dataset.test.images[3], expected)
    other = load(tmp_path, "image_folder", stored_size=8)
    assert other.train.images.shape == (6, 3, 8, 8)


def test_grey_images_stay_grey_unless_one_has_colour(tmp_path: Path) -> None:
    write_image_folder(tmp_path, mode="L")
    assert load(tmp_path, "image_folder").train.images.shape == (6, 1, 12, 20)
    Image.new("RGB", (20, 12), (1, 2, 3)).save(tmp_path / "test" / "bee" / "0.png")
    dataset = load(tmp_path, "image_folder")
    assert dataset.train.images.shape == (6, 3, 12, 20)
    grey = np.asarray(Image.open(tmp_path / "train" / "ape" / "0.png"))
    assert np.array_equal(dataset.train.images[0].numpy(), np.stack([grey] * 3))


def encode(image: Image.Image, kind: str) -> EncodedImage:
    file = io.BytesIO()
    image.save(file, kind)
    return EncodedImage("image", file.getvalue())


def decode(image: EncodedImage) -> np.ndarray:
    [chunk] = decode_chunks([image], choose_form([image], 8))
    return chunk[0]


def test_every_mode_of_pixels_is_read(recwarn: pytest.WarningsRecorder) -> None:
    red = np.zeros((4, 6, 3), dtype=np.uint8)
    red[..., 0] = 200
    expected = red.transpose(2, 0, 1)
    rgb = Image.fromarray(red)
    transparent = rgb.convert("RGBA")
    transparent.putalpha(Image.fromarray(np.full((4, 6), 17, dtype=np.uint8)))
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    for image, kind in ((rgb, "PNG"), (transparent, "PNG"), (palette, "PNG"), (palette, "GIF"), (rgb, "TIFF")):
        assert np.array_equal(decode(encode(image, kind)), expected), (image.mode, kind)
    palette.info["transparency"] = bytes([0, 255])
    assert decode(encode(palette, "PNG")).shape == (3, 4, 6)
    assert np.abs(decode(encode(rgb.convert("CMYK"), "JPEG")).astype(int) - expected).max() < 8
    for mode in ("1", "L", "LA"):
        assert decode(encode(rgb.convert(mode), "PNG")).shape == (1, 4, 6)
    deep = np.arange(24, dtype=np.uint16).reshape(4, 6) * 2800
    assert np.array_equal(decode(encode(Image.fromarray(deep), "PNG"))[0], (deep >> 8).astype(np.uint8))
    assert not recwarn.list
    with pytest.raises(ConfigError, match=r"'image' cannot be read .*floating-point"):
        decode(encode(Image.fromarray(np.ones((4, 6), dtype=np.float32)), "TIFF"))


@pytest.mark.parametrize("kind", ["jpg", "png"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.7])
def test_a_truncated_image_is_named(tmp_path: Path, kind: str, share: float) -> None:
    write_image_folder(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    path = tmp_path / "train" / "bee" / f"broken.{kind}"
    Image.fromarray(pixels).save(path)
    truncate(path, share)
    refused(tmp_path, "image_folder", f"train/bee/broken.{kind}' cannot be read")
    path.unlink()
    assert len(load(tmp_path, "image_folder").train) == 6


def test_class_folders_that_do_not_fit(tmp_path: Path) -> None:
    refused(tmp_path, "image_folder", "data.root", "train' must hold a folder for each class", "No such file")
    write_image_folder(tmp_path)
    refused(tmp_path, "image_folder", "data.classes: 3 means 3 classes", "has 2 (ape, bee)", classes=3)
    refused(tmp_path, "image_folder", "val' must hold", test_folder="val")
    (tmp_path / "test" / "cow").mkdir()
    refused(tmp_path, "image_folder", "test/cow' is a class folder without an image")
    shutil.copy(tmp_path / "test" / "ape" / "0.png", tmp_path / "test" / "cow")
    refused(tmp_path, "image_folder", "data.train_folder", "data.test_folder", "only", "has 'cow'")
    with pytest.raises(ConfigError, match="must hold a folder for each class"):
        count_classes(data_config(name="image_folder", root=str(tmp_path), train_folder="train/ape"))


# --- Hugging Face ------------------------------------------------------------------------------------------------


def make_hub_data(size: int = 12, **columns: Any) -> Any:
    """A DatasetDict with images, ClassLabel names and writers."""
    datasets = pytest.importorskip("datasets")
    rng = np.random.default_rng(0)
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["ant", "bat", "cat"]),
            "name": datasets.Value("string"),
            "writer": datasets.Value("string"),
        }
    )

    def split(size: int) -> Any:
        pictures = [Image.fromarray(p) for p in rng.integers(0, 256, (size, 10, 10, 3), dtype=np.uint8)]
        kinds = [k % 3 for k in range(size)]
        names = ["zyx"[k] for k in kinds]
        content = {"picture": pictures, "kind": kinds, "name": names, "writer": [f"w{k % 4}" for k in range(size)]}
        return datasets.Dataset.from_dict(content, features=features)

    return datasets.DatasetDict({"train": split(size), "test": split(6)})


HUB = {"image_column": "picture", "label_column": "kind"}


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize("layout", ["saved", "parquet"])
def test_huggingface_folders(tmp_path: Path, hub_cache: Path, layout: str) -> None:
    content, folder = make_hub_data(), tmp_path / "hub"
    if layout == "saved":
        content.save_to_disk(folder)
    else:
        folder.mkdir()
        for split in ("train", "test"):
            content[split].to_parquet(folder / f"{split}-00000-of-00001.parquet")
    dataset = load(tmp_path, "huggingface", path=str(folder), client_column="writer", classes=3, **HUB)
    assert dataset.class_names == ("ant", "bat", "cat")
    assert dataset.train.labels.tolist() == [k % 3 for k in range(12)]
    assert dataset.train.groups.tolist() == [k % 4 for k in range(12)]
    for number in (0, 11):
        pixels = np.asarray(content["train"][number]["picture"]).transpose(2, 0, 1)
        assert np.array_equal(dataset.train.images[number].numpy(), pixels)
    named = load(tmp_path, "huggingface", path=str(folder), image_column="picture", label_column="name")
    assert named.class_names == ("x", "y", "z")
    assert named.train.labels.tolist() == [2 - k % 3 for k in range(12)]
    assert named.train.groups is None


def test_huggingface_store_inside_the_data_folder_is_no_part_of_the_data(tmp_path: Path, hub_cache: Path) -> None:
    make_hub_data().save_to_disk(tmp_path / "hub")
    for _ in range(2):
        load(tmp_path / "hub", "huggingface", path=str(tmp_path / "hub"), **HUB)
    assert len(list((tmp_path / "hub" / ".store").glob("huggingface-*"))) == 1


def test_a_class_count_is_checked_against_a_store_that_is_there(tmp_path: Path, hub_cache: Path) -> None:
    make_hub_data().save_to_disk(tmp_path / "hub")
    load(tmp_path, "huggingface", path=str(tmp_path / "hub"), **HUB)
    with pytest.raises(ConfigError, match=r"data\.classes: 7 means 7 classes, but .* has 3"):
        load(tmp_path, "huggingface", path=str(tmp_path / "hub"), classes=7, **HUB)


def test_huggingface_keys_that_do_not_fit(tmp_path: Path, hub_cache: Path) -> None:
    folder = tmp_path / "hub"
    make_hub_data().save_to_disk(folder)
    path = {"path": str(folder)}
    refused(tmp_path, "huggingface", "data.image_column: 'image'", "picture, kind, name, writer", **path)
    refused(tmp_path, "huggingface", "data.label_column: 'label'", **path, image_column="picture")
    refused(tmp_path, "huggingface", "data.client_column: 'who'", **path, **HUB, client_column="who")
    refused(tmp_path, "huggingface", "data.test_split: 'validation'", "train, test", **path, test_split="validation")
    refused(tmp_path, "huggingface", "data.classes: 10 means 10", "has 3 (ant, bat, cat)", **path, **HUB, classes=10)
    refused(tmp_path, "huggingface", "data.image_column: 'kind'", **path, image_column="kind", label_column="kind")
    with pytest.raises(ConfigError, match=r"data.classes: null.*give the number"):
        count_classes(data_config(name="huggingface", path=str(folder)))
    assert count_classes(data_config(name="huggingface", path="a/b", classes=5)) == 5


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt to use it fails the test."""
    import socket

    def refuse(*arguments: Any, **more: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_huggingface_without_a_network(tmp_path: Path, hub_cache: Path, no_network: None) -> None:
    """What is not in the cache is told at once."""
    refused(tmp_path, "huggingface", "data.path: 'someone/something'", "fedpeft prefetch", path="someone/something")
    import huggingface_hub

    assert not huggingface_hub.constants.HF_HUB_OFFLINE, "the switch is put back"


def test_huggingface_from_the_cache(tmp_path: Path, hub_cache: Path, no_network: None) -> None:
    """What was downloaded once is used without asking the hub whether it is still the newest."""
    datasets, folder = pytest.importorskip("datasets"), tmp_path / "letters"
    folder.mkdir()
    for split, content in make_hub_data().items():
        content.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    datasets.load_dataset(str(folder))
    (hub_cache / "letters").rename(hub_cache / "someone___letters")  # as a download would have called it
    config = data_config(name="huggingface", root=str(tmp_path), path="someone/letters", **HUB)
    assert load_dataset(config, 1).train.labels.tolist() == [k % 3 for k in range(12)]
    first = image_store.store_folder(SOURCES[type(config)](config), config)
    assert image_store.store_folder(SOURCES[type(config)](config), config) == first


def test_huggingface_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def importing(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", importing)
    refused(tmp_path, "huggingface", "data.name: 'huggingface'", "fedpeft_dist[huggingface]", path="a/b")


# --- fetching ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "pcam"])
def test_a_failed_download_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from torchvision import datasets

    def fail(folder: Path, *arguments: Any, **more: Any) -> None:
        (Path(folder) / "half.tar.gz").write_bytes(b"half")
        raise OSError("Name or service not known")

    monkeypatch.setattr(datasets, name.upper(), fail)
    root = tmp_path / "data"
    with pytest.raises(ConfigError, match=f"data.name: '{name}' cannot be downloaded to data.root.*Name or service"):
        prefetch_data(data_config(name=name, root=str(root)))
    assert not root.exists()


def test_a_download_is_moved_into_place_and_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    calls = []

    def fetch(folder: Path, download: bool) -> None:
        calls.append(download)
        write_cifar10(folder)
        (folder / "cifar-10-python.tar.gz").write_bytes(b"archive")

    monkeypatch.setattr(datasets, "CIFAR10", fetch)
    config = data_config(name="cifar10", root=str(tmp_path))
    store = prefetch_data(config)
    assert store.parent == tmp_path / ".store"
    assert (store / "meta.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cifar10.lock", ".store", "cifar-10-batches-py"]
    assert prefetch_data(config) == store
    assert calls == [True]


def test_nothing_is_downloaded_for_what_is_made_here() -> None:
    assert prefetch_data(data_config(name="digits")) is None
