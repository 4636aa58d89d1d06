"""The decoded store: the first process builds it, whole or not at all, and all processes open it without a copy."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import DataConfig
from fedpeft_dist.data import image_store, load_dataset, make_source
from fedpeft_dist.data.datasets import Contents, Part
from fedpeft_dist.data.source import FileSource
from tests.data_fixtures import data_config, write_cifar100, write_image_folder
from tests.warm_process import warm_context

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    write_cifar100(tmp_path / "data")
    return data_config(name="cifar100", root=str(tmp_path / "data"), store=str(tmp_path / "store"))


def folder_of(config: DataConfig) -> Path:
    return make_source(config).store.folder


def visible(config: DataConfig) -> list[str]:
    """The files in the store's root, without locks and the note of a failure."""
    names = sorted(path.name for path in Path(config.store).iterdir())
    return [name for name in names if not name.endswith((".lock", ".failed"))]


def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    builds: list[Path] = []
    write = image_store.write_store

    def counting(contents: Contents, building: Path, folder: Path, name: str) -> None:
        builds.append(folder)
        write(contents, building, folder, name)

    monkeypatch.setattr(image_store, "write_store", counting)
    return builds


def test_a_store_is_built_once_and_opened_from_then_on(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = count_builds(monkeypatch)
    first, again = load_dataset(config, 1), load_dataset(config, 2)
    assert builds == [folder_of(config)]
    assert visible(config) == [folder_of(config).name]
    assert torch.equal(first.train.images, again.train.images)
    meta = json.loads((folder_of(config) / "meta.json").read_text())
    assert meta["class_names"] == list(first.class_names)


def test_the_default_place_is_below_root(config: DataConfig) -> None:
    other = config.model_copy(update={"store": None})
    assert folder_of(other) == Path(config.root) / ".store" / folder_of(config).name


def test_a_changed_file_makes_the_store_be_built_again(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = count_builds(monkeypatch)
    load_dataset(config, 1)
    os.utime(Path(config.root) / "cifar-100-python" / "test", (1, 1))
    load_dataset(config, 1)
    assert len(set(builds)) == 2


def test_a_moved_data_set_keeps_its_store(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_dataset(config, 1)
    builds = count_builds(monkeypatch)
    shutil.copytree(config.root, tmp_path / "elsewhere")  # with the files' times
    load_dataset(config.model_copy(update={"root": str(tmp_path / "elsewhere")}), 1)
    assert builds == []


def test_images_are_a_read_only_map_of_the_file(config: DataConfig) -> None:
    """The kernel maps the store's own file into this process, shared and read-only."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train = load_dataset(config, 1).train
    address = train.images.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(number, 16) for number in line.split()[0].split("-"))
        if low <= address < high:
            assert line.split()[1] == "r--s"
            assert line.endswith(f"{folder_of(config).name}/train_images.npy")
            return
    pytest.fail("the images are in no map")


def test_a_subset_shares_the_whole_sets_images(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_dataset(config, 1).train
    builds = count_builds(monkeypatch)
    subset = load_dataset(config.model_copy(update={"max_train": 30}), 1).train
    assert builds == []
    assert len(subset) == 30
    assert len(subset.images) == len(whole.images)
    assert len(set(subset.rows.tolist())) == 30
    assert torch.equal(subset.labels, whole.labels[subset.rows])
    other = load_dataset(config.model_copy(update={"max_train": 30}), 2).train
    assert not torch.equal(other.rows, subset.rows)


@pytest.mark.parametrize("name", ["train_images.npy", "test_labels.npy", "meta.json"])
def test_a_damaged_store_is_built_again(config: DataConfig, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    expected = load_dataset(config, 1)
    path = folder_of(config) / name
    expected_images = expected.train.images.clone()
    path.write_bytes(path.read_bytes()[:-7])
    found = load_dataset(config, 1)
    assert torch.equal(found.train.images, expected_images)
    assert "damaged" in capfd.readouterr().err
    assert visible(config) == [folder_of(config).name]


def test_a_store_without_one_of_its_files_is_built_again(config: DataConfig) -> None:
    load_dataset(config, 1)
    (folder_of(config) / "test_images.npy").unlink()
    assert len(load_dataset(config, 1).test) == 50


def test_a_store_that_cannot_be_mapped_is_not_taken_for_damaged(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_dataset(config, 1)
    builds = count_builds(monkeypatch)

    def refuse(*arguments: object, **more: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(image_store.np, "load", refuse)
    with pytest.raises(ConfigError, match=r"data.store: .*cifar100-\w+' cannot be opened \(Cannot allocate memory\)"):
        load_dataset(config, 1)
    assert builds == []
    assert (folder_of(config) / "meta.json").exists()


# --- disks -------------------------------------------------------------------------------------------------------


def test_reports_a_disk_without_room_before_decoding(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_store.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(ConfigError, match=r"data.store: '.*/store' has no room for cifar100: 770,000 bytes .* 1,000 "):
        load_dataset(config, 1)
    assert visible(config) == []
    monkeypatch.undo()
    assert len(load_dataset(config, 1).train) == 200


def test_reports_a_disk_that_fills_up_while_writing(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(part: Part, path: Path, progress: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(image_store, "_write_images", full)
    with pytest.raises(ConfigError, match=r"data.store: .* has no room for cifar100: 770,000 bytes"):
        load_dataset(config, 1)
    assert visible(config) == []
    monkeypatch.undo()
    assert len(load_dataset(config, 1).train) == 200


LIMITED = """
import resource, sys
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.data import load_dataset
from tests.data_fixtures import data_config
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    load_dataset(data_config(name="cifar100", root=sys.argv[1], store=sys.argv[2]), 1)
except ConfigError as error:
    print(error)
"""


def test_reports_a_write_that_the_kernel_refuses(config: DataConfig) -> None:
    """The process's own limit makes a write fail in the middle of a file, as a full disk does."""
    command = [sys.executable, "-c", LIMITED, config.root, config.store, "300000"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout
    assert told.startswith("data.store: ")
    for words in ("has no room for cifar100", "770,000 bytes are needed", "File too large", "another disk"):
        assert words in told
    assert told.count("\n") == 1
    assert visible(config) == []
    assert len(load_dataset(config, 1).train) == 200


@pytest.mark.parametrize("lying", [False, True], ids=["told before", "told by the write"])
def test_a_small_real_disk(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lying: bool) -> None:
    """Uses a file system of 400 KB if this process may mount one. A quota or another process may fill a disk too."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    if lying:
        usage = shutil._ntuple_diskusage(10**9, 0, 10**9)
        monkeypatch.setattr(image_store.shutil, "disk_usage", lambda path: usage)
    try:
        small = config.model_copy(update={"store": str(disk / "store")})
        with pytest.raises(ConfigError, match=r"has no room for cifar100: 770,000 bytes are needed .*No space left"):
            load_dataset(small, 1)
        assert visible(small) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_reports_a_store_that_cannot_be_made(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    blocked = config.model_copy(update={"store": str(tmp_path / "file" / "store")})
    with pytest.raises(ConfigError, match=r"data.store: '.*/file/store' cannot be written .*give data.store a folder"):
        load_dataset(blocked, 1)


def test_reports_a_root_that_may_not_be_written(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *arguments: object, **more: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ConfigError, match=r"data.store: '.*/data/.store' cannot be written \(Permission denied\)"):
        load_dataset(config.model_copy(update={"store": None}), 1)


# --- several processes -------------------------------------------------------------------------------------------


class SlowSource(FileSource):
    """A data set that is slow to read, and notes every attempt in a file."""

    def __init__(self, config: DataConfig, log: Path, seconds: float, fail: bool = False):
        super().__init__(config)
        self.log, self.seconds, self.fail = log, seconds, fail

    def num_classes(self) -> int:
        return 8

    def identity(self) -> str:
        return "slow"

    def read(self) -> Contents:
        with open(self.log, "a") as file:
            file.write("read\n")
        time.sleep(self.seconds)
        if self.fail:
            raise ConfigError("data.root: 'x.jpg' cannot be read")
        labels = np.arange(8)
        part = Part((8, 3, 4, 4), labels, lambda: iter([np.full((8, 3, 4, 4), 7, dtype=np.uint8)]))
        return Contents(("a",) * 8, part, part)


def open_slow(slow: SlowSource, start: object, results: object) -> None:
    start.wait()
    began = time.monotonic()
    try:
        results.put((int(slow.load(seed=1).train.images.sum()), 0.0))
    except ConfigError as error:
        results.put((str(error), time.monotonic() - began))


def open_at_once(slow: SlowSource, count: int) -> list[tuple]:
    context = warm_context()
    start, results = context.Barrier(count), context.Queue()
    processes = [context.Process(target=open_slow, args=(slow, start, results)) for _ in range(count)]
    for process in processes:
        process.start()
    found = [results.get(timeout=100) for _ in processes]
    for process in processes:
        process.join()
    return found


def test_one_of_several_processes_builds_and_the_others_wait(config: DataConfig, tmp_path: Path) -> None:
    log = tmp_path / "log"
    found = open_at_once(SlowSource(config, log, 1.0), 3)
    assert [result for result, _ in found] == [8 * 3 * 4 * 4 * 7] * 3
    assert log.read_text() == "read\n"


def test_processes_that_waited_for_a_failed_builder_raise_its_error(config: DataConfig, tmp_path: Path) -> None:
    log = tmp_path / "log"
    found = open_at_once(SlowSource(config, log, 1.0, fail=True), 3)
    assert [message for message, _ in found] == ["data.root: 'x.jpg' cannot be read"] * 3
    assert log.read_text() == "read\n"
    # A later process tries again.
    assert len(SlowSource(config, log, 0.0).load(seed=1).train) == 8


KILLED = """
import sys
from pathlib import Path
from fedpeft_dist.data import image_store
from tests.data_fixtures import data_config
from tests.unit.test_image_store import SlowSource
import time
write = image_store._write_images
def slow(part, path, progress):
    write(part, path, progress)
    print("written", flush=True)
    time.sleep(100)
image_store._write_images = slow
SlowSource(data_config(name="cifar100", store=sys.argv[1]), Path(sys.argv[2]), 0.0).load(seed=1)
"""


def test_the_next_builder_removes_the_files_of_a_killed_one(config: DataConfig, tmp_path: Path) -> None:
    """This holds for builders of any data set in the same place. Files of a living builder stay."""
    command = [sys.executable, "-c", KILLED, config.store, str(tmp_path / "log")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    [left] = visible(config)
    assert left.endswith(".building")

    load_dataset(config, 1)  # another data set, while the builder lives
    assert left in visible(config)

    process.send_signal(signal.SIGKILL)
    process.wait()
    write_image_folder(tmp_path / "images")
    load_dataset(data_config(name="image_folder", root=str(tmp_path / "images"), store=config.store), 1)
    assert len(visible(config)) == 2
    assert not any(name.endswith(".building") for name in visible(config))
    assert len(SlowSource(config, tmp_path / "log", 0.0).load(seed=1).train) == 8


def test_an_existing_store_needs_no_lock(config: DataConfig) -> None:
    load_dataset(config, 1)
    with FileLock(make_source(config).store.lock_file):
        assert len(load_dataset(config, 1).train) == 200


def test_an_interruption_leaves_nothing(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(part: Part, path: Path, progress: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(image_store, "_write_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_dataset(config, 1)
    assert visible(config) == []
