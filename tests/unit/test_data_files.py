"""Data sets of files: reading a small one in the format it has on disk, and the errors for damaged files."""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.data import cifar, count_classes, load_dataset, make_source, prefetch_data
from fedpeft_dist.data.datasets import Dataset
from fedpeft_dist.data.image_files import EncodedImage, choose_form, decode_chunks
from fedpeft_dist.data.image_folder import list_images
from fedpeft_dist.data.partition import make_partition
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


def test_the_error_for_missing_files_names_them_and_the_remedy(tmp_path: Path) -> None:
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
def test_refuses_a_batch_of_another_form(tmp_path: Path, content: Any, words: str) -> None:
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
    store = make_source(config).store.folder
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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_lists_may_begin_with_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    names = sorted(f"{path.parent.name}/{path.name}" for path in write_resisc45(tmp_path, per_class=2).rglob("*.jpg"))
    keys = {}
    for split, own in {"train": names[0::2], "test": names[1::2]}.items():
        (tmp_path / f"{split}.txt").write_text("\r\n".join(own), encoding=encoding)
        keys[f"{split}_list"] = str(tmp_path / f"{split}.txt")
    assert len(load(tmp_path, "resisc45", **keys).train) == 45


def test_a_listed_name_that_several_files_have_is_refused(tmp_path: Path) -> None:
    folder = write_resisc45(tmp_path, per_class=2)
    for name in ("scene_00", "scene_01"):
        (folder / name / "deep").mkdir()
        shutil.copy(folder / name / f"{name}_001.jpg", folder / name / "deep" / "same.jpg")
    names = sorted(f"{path.parent.name}/{path.name}" for path in folder.glob("*/*.jpg"))
    keys = {f"{split}_list": str(tmp_path / f"{split}.txt") for split in ("train", "test")}
    (tmp_path / "test.txt").write_text("\n".join(names[1::2]))
    (tmp_path / "train.txt").write_text("\n".join([*names[0::2], "same.jpg"]))
    refused(tmp_path, "resisc45", "data.train_list", "'same.jpg'", "2 files have", **keys)
    (tmp_path / "train.txt").write_text("\n".join([*names[0::2], "scene_01/deep/same.jpg"]))
    assert len(load(tmp_path, "resisc45", **keys).train) == 46


def test_resisc45_names_that_are_no_utf_8(tmp_path: Path) -> None:
    """The split that is written down can be given as lists again."""
    folder = write_resisc45(tmp_path, per_class=2)
    os.rename(folder / "scene_07", os.fsencode(folder) + b"/caf\xe9")
    config = data_config(name="resisc45", root=str(tmp_path))
    dataset = load_dataset(config, 1)
    assert dataset.class_names[0] == r"caf\xe9"
    assert dataset.fingerprint()
    store = make_source(config).store.folder
    again = load(tmp_path, "resisc45", train_list=str(store / "train.txt"), test_list=str(store / "test.txt"))
    assert sorted(again.train.labels.tolist()) == list(range(45))


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
    """The result is that of torchvision, which resizes on the shorter side and crops the centre."""
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


def note(text: str) -> str:
    """The one line on stderr."""
    (line,) = text.splitlines()
    return line


@pytest.mark.parametrize("place", ["train", "test"])
def test_one_image_of_another_size_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    write_image_folder(tmp_path)
    assert not load(tmp_path, "image_folder").cropped
    assert capsys.readouterr().err == ""
    Image.new("RGB", (19, 12)).save(tmp_path / place / "bee" / "odd.png")
    for _ in range(2):
        assert load(tmp_path, "image_folder", stored_size=16).cropped
    line = note(capsys.readouterr().err)
    for words in (f"{place}/bee/odd.png' is 19 x 12 pixels", "12 of 13 images are 20 x 12", "central 16 x 16"):
        assert words in line


def test_resisc45_tells_of_an_image_of_another_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_resisc45(tmp_path, per_class=2, side=4)
    Image.new("RGB", (4, 9)).save(folder / "scene_20" / "scene_20_002.jpg")
    assert load(tmp_path, "resisc45").cropped
    assert "scene_20_002.jpg' is 4 x 9 pixels, and 89 of 90 images are 4 x 4" in note(capsys.readouterr().err)


def test_nested_folders_are_listed_as_torchvision_lists_them(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    write_image_folder(tmp_path)
    source = tmp_path / "test" / "ape" / "0.png"
    for folder in ("images", "a/b", "a-b", "a/b/c d", "B"):  # the first is Tiny-ImageNet's
        for name in ("z.png", "Y.png", "10.png", "9.PNG"):
            place = tmp_path / "train" / "bee" / folder
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, place / name)
    expected = ImageFolder(tmp_path / "train")
    listed = list_images(tmp_path / "train")
    assert [str(tmp_path / "train" / name) for own in listed.files.values() for name in own] == [
        path for path, _ in expected.samples
    ]
    assert load(tmp_path, "image_folder").train.labels.tolist() == expected.targets


def test_a_class_may_hold_nothing_but_folders(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "flat")
    for split in ("train", "test"):
        for name in ("ape", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            shutil.copytree(tmp_path / "flat" / split / name, tmp_path / split / name / "images")
    nested, flat = load(tmp_path, "image_folder"), load(tmp_path / "flat", "image_folder")
    assert torch.equal(nested.train.images, flat.train.images)


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "JPEG", "webp", "jp2", "tga", "pnm", "dib", "apng", "Tif", "pcx"])
def test_endings_of_pictures_are_read(tmp_path: Path, suffix: str) -> None:
    write_image_folder(tmp_path)
    kind = Image.registered_extensions()[f".{suffix.lower()}"]
    Image.new("RGB", (20, 12), (200, 10, 10)).save(tmp_path / "train" / "ape" / f"a.{suffix}", kind)
    dataset = load(tmp_path, "image_folder")
    assert len(dataset.train) == 7
    assert (dataset.train.images[3, :, 6, 10].int() - torch.tensor([200, 10, 10])).abs().max() < 10


def test_files_passed_over_are_counted_once_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image_folder(tmp_path)
    ape = tmp_path / "train" / "ape"
    for name in ("notes.txt", "boxes.TXT", "x.heic", "README", ".hidden.png", "depth.pfm", "../labels.csv"):
        (ape / name).write_text("no image")
    (ape / ".cache").mkdir()
    (ape / "gone.png").symlink_to(tmp_path / "absent.png")
    (ape / "self.png").symlink_to("self.png")
    (ape / "up").symlink_to("..")  # to the folder that holds the class folders
    (ape / "link.png").symlink_to(tmp_path / "train" / "bee" / "0.png")
    for _ in range(2):
        assert len(load(tmp_path, "image_folder").train) == 3 + 1 + 3 + 3
    line = note(capsys.readouterr().err)
    for words in ("2 .txt", "1 .heic", "1 without an ending", "2 hidden", "1 .pfm", "2 broken links", "/train'"):
        assert words in line
    assert "1 beside the class folders" in line
    assert "1 links to a folder above" in line
    assert "/test'" not in line


def test_a_class_of_other_files_only_is_refused(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    (tmp_path / "train" / "cow" / "deep").mkdir(parents=True)
    (tmp_path / "train" / "cow" / "deep" / "a.heic").write_text("")
    refused(tmp_path, "image_folder", "train/cow' is a class folder without an image (1 other files)", ".jpg")


def test_names_that_are_no_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image_folder(tmp_path)
    for split in ("train", "test"):
        os.rename(tmp_path / split / "ape", os.fsencode(tmp_path / split) + b"/caf\xe9")
    odd = os.fsencode(tmp_path / "train") + b"/caf\xe9/\xff\xfe.png"
    shutil.copy(tmp_path / "train" / "bee" / "0.png", odd)
    dataset = load(tmp_path, "image_folder")
    assert dataset.class_names == ("bee", r"caf\xe9")
    assert len(dataset.train) == 7
    assert load(tmp_path, "image_folder").fingerprint() == dataset.fingerprint()
    Image.new("RGB", (3, 3)).save(os.fsdecode(odd))
    load(tmp_path, "image_folder")
    assert r"train/caf\xe9/\xff\xfe.png' is 3 x 3" in note(capsys.readouterr().err)
    truncate(Path(os.fsdecode(odd)))
    with pytest.raises(ConfigError, match=re.escape(r"caf\xe9/\xff\xfe.png' cannot be read")) as caught:
        load(tmp_path, "image_folder")
    str(caught.value).encode()


def encode(image: Image.Image, kind: str) -> EncodedImage:
    file = io.BytesIO()
    image.save(file, kind)
    return EncodedImage("image", file.getvalue())


def decode(image: EncodedImage, side: int = 8) -> np.ndarray:
    [chunk] = decode_chunks([image], choose_form([image], side))
    return chunk[0]


def tiff_of_12_bits(values: list[int]) -> bytes:
    """A TIFF of one row."""
    bits = "".join(f"{value:012b}" for value in values)
    data = int(bits.ljust(-(-len(bits) // 16) * 16, "0"), 2).to_bytes(-(-len(bits) // 16) * 2, "big")
    tags = {256: len(values), 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = b"II*\0" + struct.pack("<I", 8 + len(data))
    return start + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_a_tiff_of_12_bits_keeps_its_scale() -> None:
    assert decode(EncodedImage("image", tiff_of_12_bits([0, 16, 2048, 4095])))[0].tolist() == [[0, 1, 128, 255]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("top", [0, 256, 4095, 65535])
def test_pixels_of_16_bits_keep_their_scale(kind: str, top: int) -> None:
    deep = np.linspace(0, top, 24).reshape(4, 6).astype(np.uint16)
    assert np.array_equal(decode(encode(Image.fromarray(deep), kind))[0], deep >> 8)


@pytest.mark.parametrize(
    ("pixels", "kind", "words"),
    [
        (np.full((4, 6), 200, np.int32), "TIFF", "32-bit integers, whose white is not known: mode I)"),
        (np.full((4, 6), 70_000, np.int32), "TIFF", "mode I)"),
        (np.full((4, 6), 0.5, np.float32), "TIFF", "floating-point numbers: mode F)"),
        (np.full((4, 6), 255, np.uint16), "TIFF", "at most 255, which is black where white is 65,535: mode I;16)"),
        (np.full((4, 6), 1, np.uint16), "PNG", "at most 1, which is black"),
    ],
)
def test_pixels_without_a_right_scale_are_refused(pixels: np.ndarray, kind: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        decode(encode(Image.fromarray(pixels), kind))
    assert "save it with 8 bits a channel" in str(caught.value)


def test_colours_that_pillow_does_not_convert_are_refused_by_mode() -> None:
    with pytest.raises(ConfigError, match="unsupported kind: mode LAB"):
        decode(encode(Image.new("LAB", (4, 6)), "TIFF"))


@pytest.mark.parametrize("content", [b"", b"<html></html>", bytes(300)])
def test_the_error_for_content_that_is_not_an_image_shows_no_python_object(content: bytes) -> None:
    with pytest.raises(ConfigError, match="'image' cannot be read") as caught:
        decode(EncodedImage("image", content))
    assert "object at" not in str(caught.value)


def test_a_picture_over_pillows_limit_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    write_image_folder(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)  # Pillow warns from there on, and refuses from twice as many
    assert len(load(tmp_path, "image_folder").train) == 6
    assert not recwarn.list
    Image.new("RGB", (21, 15)).save(tmp_path / "test" / "bee" / "large.png")
    with pytest.raises(ConfigError, match=r"large\.png' cannot be read .* 315 pixels, .* at most 300.*smaller picture"):
        load(tmp_path, "image_folder")


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (2, 4001), (977, 3)])
def test_an_elongated_image_is_cropped_before_it_is_resized(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    largest, resize = [0], Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], *arguments: Any, **more: Any) -> Image.Image:
        largest.append(size[0] * size[1])
        return resize(self, size, *arguments, **more)

    monkeypatch.setattr(Image.Image, "resize", watched)
    ramp = np.linspace(0, 255, max(size)).astype(np.uint8).reshape(size[::-1] if min(size) == 1 else (-1, 1))
    ramp = np.broadcast_to(ramp if size[1] > size[0] else ramp.reshape(1, -1), size[::-1])
    image, small = encode(Image.fromarray(np.ascontiguousarray(ramp)), "PNG"), encode(Image.new("L", (9, 9)), "PNG")
    [chunk] = decode_chunks([image], choose_form([image, small], 32))
    assert max(largest) <= 8 * 32 * 32
    assert np.abs(chunk[0].astype(int) - 127).max() <= 1  # the middle of the ramp


@pytest.mark.parametrize("size", [(50, 390), (390, 50), (600, 50), (45, 700), (12, 200)])
def test_an_elongated_image_has_the_pixels_of_one_resized_whole(size: tuple[int, int]) -> None:
    """The reference is Pillow alone."""
    across, down = np.linspace(0, 6, size[0]), np.linspace(0, 6, size[1])
    waves = (127 + 60 * np.sin(9 * across)[None] + 60 * np.cos(7 * down)[:, None]).astype(np.uint8)
    picture = Image.fromarray(waves)
    width, height = (24 * side // min(size) for side in size)
    left, top = (width - 24) // 2, (height - 24) // 2
    whole = picture.resize((width, height), Image.Resampling.BICUBIC)
    expected = np.asarray(whole.crop((left, top, left + 24, top + 24))).astype(int)
    image, small = encode(picture, "PNG"), encode(Image.new("L", (9, 9)), "PNG")
    [chunk] = decode_chunks([image], choose_form([image, small], 24))
    assert np.abs(chunk[0, 0] - expected).max() <= (0 if max(size) < 8 * min(size) else 2)


def turned(pixels: np.ndarray, orientation: int, kind: str = "JPEG") -> EncodedImage:
    """Encoded with an EXIF orientation."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[274] = orientation
    Image.fromarray(pixels).save(file, kind, exif=exif, **({"quality": 100} if kind == "JPEG" else {}))
    return EncodedImage("image", file.getvalue())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_of_folders_are_not_turned_by_exif(orientation: int, kind: str) -> None:
    """torchvision and timm read class folders in the same way."""
    pixels = np.arange(4 * 6, dtype=np.uint8).reshape(4, 6)
    pixels = np.stack([pixels * 10] * 3, axis=-1)
    image = turned(pixels, orientation, kind)
    with Image.open(io.BytesIO(image.content)) as plain:
        assert np.array_equal(decode(image), np.asarray(plain.convert("RGB")).transpose(2, 0, 1))


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


def jpeg(orientation: int = 1) -> bytes:
    """A picture of 10 x 6 pixels whose brightness tells which side is up."""
    pixels = np.add.outer(np.arange(6) * 24, np.arange(10) * 12).astype(np.uint8)
    return turned(np.stack([pixels] * 3, axis=-1), orientation).content


def save_splits(folder: Path, train: dict[str, Any], test: dict[str, Any], **kinds: Any) -> dict[str, str]:
    """Saves columns beside a column of images; `kinds` gives (train's, test's) types. Returns the config's keys."""
    datasets = pytest.importorskip("datasets")
    splits = {}
    for number, (name, columns) in enumerate({"train": train, "test": test}.items()):
        size = len(next(iter(columns.values())))
        columns = {"image": [{"bytes": jpeg(), "path": None}] * size, **columns}
        features = {key: both[number] for key, both in kinds.items()}
        told = {"image": datasets.Image(), **features}
        inferred = datasets.Dataset.from_dict({key: columns[key] for key in columns if key not in told}).features
        splits[name] = datasets.Dataset.from_dict(columns, features=datasets.Features({**inferred, **told}))
    datasets.DatasetDict(splits).save_to_disk(folder)
    return {"path": str(folder)}


def write_parquet(folder: Path, images: list[Any]) -> dict[str, str]:
    """Two good images to train and these to test on, past the library's checks. Returns the config's keys."""
    datasets = pytest.importorskip("datasets")
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir()
    told = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    kind = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64()})
    kind = kind.with_metadata({"huggingface": json.dumps({"info": {"features": told.to_dict()}})})
    for split, own in {"train": [{"bytes": jpeg(), "path": None}] * 2, "test": images}.items():
        table = pa.Table.from_pydict({"image": own, "label": [k % 2 for k in range(len(own))]}, schema=kind)
        parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return {"path": str(folder)}


def labels_of(*names: str) -> Any:
    return pytest.importorskip("datasets").ClassLabel(names=list(names))


def test_labels_go_by_the_name_where_the_test_split_lists_them_in_another_order(tmp_path: Path) -> None:
    kinds = labels_of("ant", "bat", "cat"), labels_of("cat", "ant", "bat")
    keys = save_splits(tmp_path / "hub", {"label": [0, 1, 2, 0]}, {"label": [0, 1, 2, 0]}, label=kinds)
    dataset = load(tmp_path, "huggingface", **keys)
    assert dataset.class_names == ("ant", "bat", "cat")
    assert dataset.train.labels.tolist() == [0, 1, 2, 0]
    assert dataset.test.labels.tolist() == [2, 0, 1, 2]


@pytest.mark.parametrize("names", [("ant", "bat"), ("bat", "ant", "dog"), ("bat",)])
def test_other_label_names_do_as_long_as_no_sample_has_them(tmp_path: Path, names: tuple[str, ...]) -> None:
    kinds = labels_of("ant", "bat", "cat"), labels_of(*names)
    keys = save_splits(tmp_path / "hub", {"label": [0, 1, 2]}, {"label": [0, 0]}, label=kinds)
    expected = ("ant", "bat", "cat").index(names[0])
    assert load(tmp_path, "huggingface", **keys).test.labels.tolist() == [expected] * 2


@pytest.mark.parametrize("values", [["b", "a"], [7, 3], [1.0, 0.0], [True, False]])
def test_labels_without_names_are_the_sorted_values(tmp_path: Path, values: list[Any]) -> None:
    keys = save_splits(tmp_path / "hub", {"label": values}, {"label": values[:1]})
    dataset = load(tmp_path, "huggingface", **keys)
    assert dataset.class_names == tuple(map(str, sorted(values)))
    assert (dataset.train.labels.tolist(), dataset.test.labels.tolist()) == ([1, 0], [1])


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        (
            [0, 1],
            [-1, -1],
            "'label' of '{path}' holds -1 in row 0 (from 0) of split 'test'; labels count from 0, and -1",
        ),
        ([0, -1], [0, 1], "holds -1 in row 1 (from 0) of split 'train'"),
        ([0, 1], [0, 2], "holds 2 in row 1 (from 0) of split 'test'; the classes of split 'train' are 0, 1"),
        (
            ["a", "b"],
            ["a", "B"],
            "holds 'B' in row 1 (from 0) of split 'test'; the classes of split 'train' are 'a', 'b'",
        ),
        (["0", "1"], [0, 1], "holds 0 in row 0 (from 0) of split 'test'; the classes of split 'train' are '0', '1'"),
        ([0, None], [0, 1], "holds null in row 1 (from 0) of split 'train'; every row needs a value"),
        (["a", "b"], ["a", None], "holds null in row 1 (from 0) of split 'test'"),
        ([0.0, float("nan")], [0.0, 1.0], "holds null in row 1 (from 0) of split 'train'"),
        ([0.0, 0.37], [0.0, 1.0], "holds 0.37 in row 1 (from 0) of split 'train'; a label is a whole number or text"),
        ([0, 1], [0.0, float("inf")], "of split 'test'"),
        (
            [[0], [1, 2]],
            [[0], [1]],
            "holds a list in row 0 (from 0) of split 'train'; every row needs one number or text",
        ),
        (["a", "b"], [["a"], ["b"]], "holds a list in row 0 (from 0) of split 'test'"),
        ([{"x": 1}, {"x": 2}], [{"x": 1}], "holds several fields in row 0 (from 0) of split 'train'"),
        ([0, 1], [], "'{path}', split 'test', holds no sample"),
        ([], [0, 1], "'{path}', split 'train', holds no sample"),
    ],
)
def test_labels_that_are_no_classes_are_refused_by_row(tmp_path: Path, train: list, test: list, words: str) -> None:
    keys = save_splits(tmp_path / "hub", {"label": train}, {"label": test})
    refused(tmp_path, "huggingface", words.format(**keys), "data.", **keys)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, -1], "holds -1 in row 1 (from 0) of split 'test'; labels count from 0, and -1 marks a sample without one"),
        ([None, 1], "holds null in row 0 (from 0) of split 'test'"),
        ([0, 3], "holds 'dog' in row 1 (from 0) of split 'test'; the classes of split 'train' are 'ant', 'bat', 'cat'"),
    ],
)
def test_label_numbers_without_a_class_are_refused_by_row(tmp_path: Path, labels: list, words: str) -> None:
    kinds = labels_of("ant", "bat", "cat"), labels_of("ant", "bat", "cat", "dog")
    keys = save_splits(tmp_path / "hub", {"label": [0, 1, 2]}, {"label": labels}, label=kinds)
    refused(tmp_path, "huggingface", "data.label_column: 'label'", words, **keys)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (None, "data.image_column: 'image' of '{path}' holds null in row 1 (from 0) of split 'test'"),
        ({"bytes": None, "path": None}, "holds null in row 1 (from 0) of split 'test'"),
        ({"bytes": b"", "path": None}, "data.path: '{path}, split test, row 1 (from 0), column image' cannot be read"),
        ({"bytes": b"<html>", "path": "a.jpg"}, "(Pillow knows no such image or pixels)"),
        ({"bytes": None, "path": "absent.jpg"}, "row 1 (from 0), column image' cannot be read ([Errno 2] No such file"),
    ],
)
def test_images_that_are_missing_or_damaged_are_refused_by_row(
    tmp_path: Path, hub_cache: Path, image: Any, words: str
) -> None:
    keys = write_parquet(tmp_path / "hub", [{"bytes": jpeg(), "path": None}, image])
    refused(tmp_path, "huggingface", words.format(**keys), **keys)


def test_reports_data_that_the_library_cannot_read_in_one_line(
    tmp_path: Path, hub_cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The library logs an error of its own for a Parquet file without rows, or reads it as an empty split."""
    keys = write_parquet(tmp_path / "hub", [])
    capfd.readouterr()
    refused(tmp_path, "huggingface", f"data.path: '{keys['path']}'", **keys)
    assert capfd.readouterr().err == ""


def test_a_column_of_several_images_is_refused_by_its_type(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    several = [[{"bytes": jpeg(), "path": None}]]
    kind = datasets.Sequence(datasets.Image())
    columns = {"label": [0], "frames": several}
    keys = save_splits(tmp_path / "hub", columns, columns, frames=(kind, kind))
    refused(tmp_path, "huggingface", "'frames' of", "holds no images but List(Image", **keys, image_column="frames")


@pytest.mark.parametrize(
    ("clients", "words"),
    [
        (["w1", None], "data.client_column: 'who' of '{path}' holds null in row 1 (from 0) of split 'train'"),
        ([1.0, float("nan")], "holds null in row 1"),
        ([["w1"], ["w2"]], "holds a list in row 0"),
    ],
)
def test_a_sample_without_a_client_is_refused_by_row(tmp_path: Path, clients: list, words: str) -> None:
    keys = save_splits(tmp_path / "hub", {"label": [0, 1], "who": clients}, {"label": [0, 1], "who": clients})
    refused(tmp_path, "huggingface", words.format(**keys), **keys, client_column="who")
    assert load(tmp_path, "huggingface", **keys).train.groups is None


def test_natural_clients_without_their_column_name_the_key(tmp_path: Path) -> None:
    keys = save_splits(tmp_path / "hub", {"label": [0, 1]}, {"label": [0, 1]})
    config = data_config(name="huggingface", root=str(tmp_path), clients=None, partition={"name": "natural"}, **keys)
    with pytest.raises(ConfigError, match=r"natural.*data\.client_column: null"):
        make_partition(config, load_dataset(config, 1).train, 1)
    write_cifar10(tmp_path)
    config = data_config(name="cifar10", root=str(tmp_path), clients=None, partition={"name": "natural"})
    with pytest.raises(ConfigError, match=r"'natural', but 'cifar10' knows no natural clients; .*glyphs"):
        make_partition(config, load_dataset(config, 1).train, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_hub_images_are_turned_by_exif_as_the_library_turns_them(tmp_path: Path, orientation: int) -> None:
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": jpeg(orientation), "path": None}] * 2
    columns = {"image": images, "label": [0, 1]}
    keys = save_splits(tmp_path / "hub", columns, columns)
    dataset = load(tmp_path, "huggingface", **keys)
    expected = np.asarray(datasets.load_from_disk(keys["path"])["train"][0]["image"]).transpose(2, 0, 1)
    assert np.array_equal(dataset.train.images[0].numpy(), expected)
    assert not dataset.cropped


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_hub_image_with_damaged_exif_is_not_turned(
    tmp_path: Path, kind: str, recwarn: pytest.WarningsRecorder
) -> None:
    file = io.BytesIO()
    Image.new("RGB", (10, 6), (9, 9, 9)).save(file, kind, exif=b"Exif\0\0garbage")
    columns = {"image": [{"bytes": file.getvalue(), "path": None}] * 2, "label": [0, 1]}
    keys = save_splits(tmp_path / "hub", columns, columns)
    recwarn.clear()
    assert load(tmp_path, "huggingface", **keys).train.images.shape == (2, 3, 6, 10)
    assert not recwarn.list


def test_a_data_set_that_was_saved_with_a_format_is_read_without_it(tmp_path: Path) -> None:
    content = make_hub_data().with_format("numpy")
    content.save_to_disk(tmp_path / "hub")
    dataset = load(tmp_path, "huggingface", path=str(tmp_path / "hub"), client_column="writer", **HUB)
    assert dataset.train.labels.tolist() == [k % 3 for k in range(12)]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt to use the network fails the test."""
    import socket

    def refuse(*arguments: Any, **more: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_huggingface_without_a_network(tmp_path: Path, hub_cache: Path, no_network: None) -> None:
    """Data outside the cache is reported at once."""
    refused(tmp_path, "huggingface", "data.path: 'someone/something'", "fedpeft prefetch", path="someone/something")
    import huggingface_hub

    assert not huggingface_hub.constants.HF_HUB_OFFLINE, "the switch is put back"


def test_huggingface_from_the_cache(tmp_path: Path, hub_cache: Path, no_network: None) -> None:
    """Downloaded data is used without asking the hub for a newer version."""
    datasets, folder = pytest.importorskip("datasets"), tmp_path / "letters"
    folder.mkdir()
    for split, content in make_hub_data().items():
        content.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    datasets.load_dataset(str(folder))
    (hub_cache / "letters").rename(hub_cache / "someone___letters")  # as a download would have called it
    config = data_config(name="huggingface", root=str(tmp_path), path="someone/letters", **HUB)
    assert load_dataset(config, 1).train.labels.tolist() == [k % 3 for k in range(12)]
    first = make_source(config).store.folder
    assert make_source(config).store.folder == first


def test_huggingface_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def importing(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", importing)
    refused(tmp_path, "huggingface", "data.name: 'huggingface'", "fedpeft_dist[huggingface]", path="a/b")


# --- places ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *((name, key) for name in ("cifar10", "pcam", "digits") for key in ("root", "store")),
        *(("resisc45", key) for key in ("root", "store", "train_list", "test_list")),
        *(("image_folder", key) for key in ("root", "store", "train_folder", "test_folder")),
        *(("huggingface", key) for key in ("root", "store", "path")),
    ],
)
def test_a_tilde_is_the_home_folder_in_every_path(name: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    others = {
        "huggingface": {"path": "a/b"},
        "resisc45": {"train_list": "a", "test_list": "b"} if key.endswith("list") else {},
    }.get(name, {})

    def expanded(path: str) -> str:
        return getattr(data_config(**{"name": name, **others, key: path}), key)

    assert expanded("~/x") == "/home/me/x"
    assert expanded("~") == "/home/me"
    for plain in ("x", "./~x/y", "a/~", "/a/b"):
        assert expanded(plain) == plain
    with pytest.raises(ValueError, match=r"'~nobody-here/x': ~nobody-here is no user's home folder"):
        expanded("~nobody-here/x")


def test_data_and_store_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_image_folder(tmp_path / "images")
    assert len(load(Path("~/images"), "image_folder", store="~/stores").train) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "stores"]


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


def test_prefetch_downloads_nothing_for_a_data_set_that_is_made() -> None:
    assert prefetch_data(data_config(name="digits")) is None
