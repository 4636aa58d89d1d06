"""Checkpoints, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedpeft_dist.checkpoint import Checkpoint, load_newest_checkpoint, save_checkpoint
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.runtime.files import write_atomically, write_text


def checkpoint_of(next_round: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(next_round)
    vector = torch.randn(50, generator=generator)
    vector[:4] = torch.tensor([0.1, -0.0, 1e-42, 3e38])  # a subnormal and a negative zero must survive
    state = {"mean": torch.randn(50, generator=generator), "square": torch.rand(50, generator=generator)}
    return Checkpoint(
        next_round,
        f"{next_round:064x}",
        f"{next_round:032x}",
        vector,
        state,
        {"rejected": 3, "samples": 2**40, "seconds": 0.1 + 0.2},
    )


def assert_same(found: Checkpoint | None, expected: Checkpoint) -> None:
    assert found is not None
    assert (found.next_round, found.totals) == (expected.next_round, expected.totals)
    assert (found.backbone_sha256, found.data_sha256) == (expected.backbone_sha256, expected.data_sha256)
    assert torch.equal(found.vector.view(torch.int32), expected.vector.view(torch.int32))
    assert found.server_state.keys() == expected.server_state.keys()
    for name, tensor in expected.server_state.items():
        assert torch.equal(found.server_state[name], tensor)


def test_a_checkpoint_comes_back_to_the_bit(tmp_path: Path) -> None:
    assert load_newest_checkpoint(tmp_path / "checkpoints") is None
    save_checkpoint(tmp_path / "checkpoints", checkpoint_of(7))
    assert_same(load_newest_checkpoint(tmp_path / "checkpoints"), checkpoint_of(7))


def test_a_server_without_state_has_a_checkpoint_too(tmp_path: Path) -> None:
    expected = Checkpoint(0, "ab", "cd", torch.zeros(3), {}, {})
    save_checkpoint(tmp_path, expected)
    assert_same(load_newest_checkpoint(tmp_path), expected)


def test_views_and_strided_tensors_are_saved_as_they_look(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).view(3, 4)
    save_checkpoint(tmp_path, Checkpoint(1, "ab", "cd", matrix[:, 1], {"momentum": matrix[:, 1]}, {}))
    found = load_newest_checkpoint(tmp_path)
    assert found.vector.tolist() == found.server_state["momentum"].tolist() == [1.0, 5.0, 9.0]


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for next_round in (1, 2, 9, 10, 100):
        save_checkpoint(tmp_path, checkpoint_of(next_round))
        assert_same(load_newest_checkpoint(tmp_path), checkpoint_of(next_round))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["round-000010.safetensors", "round-000100.safetensors"]


METADATA = {"next_round": "2", "backbone_sha256": "ab", "data_sha256": "cd", "totals": "{}"}


def corrupt(path: Path, how: str) -> None:
    content = path.read_bytes()
    match how:
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "empty":
            path.write_bytes(b"")
        case "noise":
            path.write_bytes(bytes(range(256)) * 8)
        case "no metadata":
            save_file({"vector": torch.zeros(3)}, path)
        case "no vector":
            save_file({"server.mean": torch.zeros(3)}, path, metadata=METADATA)
        case "no backbone":
            metadata = {key: value for key, value in METADATA.items() if key != "backbone_sha256"}
            save_file({"vector": torch.zeros(3)}, path, metadata=metadata)
        case "no data":
            metadata = {key: value for key, value in METADATA.items() if key != "data_sha256"}
            save_file({"vector": torch.zeros(3)}, path, metadata=metadata)
        case "bad totals":
            save_file({"vector": torch.zeros(3)}, path, metadata=METADATA | {"totals": "{"})


@pytest.mark.parametrize(
    "how", ["cut", "empty", "noise", "no metadata", "no vector", "no backbone", "no data", "bad totals"]
)
def test_a_corrupt_file_is_named_and_can_be_removed(tmp_path: Path, how: str) -> None:
    for next_round in (1, 2):
        save_checkpoint(tmp_path, checkpoint_of(next_round))
    newest = tmp_path / "round-000002.safetensors"
    corrupt(newest, how)
    with pytest.raises(ConfigError, match="remove it to go on from the one before") as error:
        load_newest_checkpoint(tmp_path)
    assert str(error.value).startswith(f"{newest}: ")
    newest.unlink()
    assert_same(load_newest_checkpoint(tmp_path), checkpoint_of(1))


def test_a_write_that_was_killed_leaves_no_checkpoint(tmp_path: Path) -> None:
    """A process that dies while writing leaves its temporary file, which is not taken for a checkpoint."""
    save_checkpoint(tmp_path, checkpoint_of(1))
    temporary: list[Path] = []
    write_atomically(tmp_path / "round-000002.safetensors", lambda path: (temporary.append(path), path.touch()))
    (tmp_path / "round-000002.safetensors").rename(temporary[0])
    assert_same(load_newest_checkpoint(tmp_path), checkpoint_of(1))


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for next_round in (1, 2):
        save_checkpoint(tmp_path, checkpoint_of(next_round))
    monkeypatch.setattr(os, "fsync", fail_with_full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, checkpoint_of(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"round-00000{n}.safetensors" for n in (1, 2)]
    assert_same(load_newest_checkpoint(tmp_path), checkpoint_of(2))


def fail_with_full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_half_and_fail(path: Path) -> None:
    path.write_text("half of the ne")
    raise RuntimeError("the writer failed")


def test_a_writer_that_raises_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="the writer failed"):
        write_atomically(path, write_half_and_fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")
    monkeypatch.setattr(os, call, fail_with_full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_first_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        write_atomically(tmp_path / "a" / "b.txt", write_half_and_fail)
    assert list((tmp_path / "a").iterdir()) == []


def test_a_writer_sees_the_suffix_and_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "picture.png"
    write_text(path, "old")
    events: list[str] = []
    flush, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("flush"), flush(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))

    def write(temporary: Path) -> None:
        assert temporary.suffix == ".png"
        assert temporary.parent == path.parent
        assert temporary != path
        assert path.read_text() == "old"
        temporary.write_text("new")
        events.append("write")

    write_atomically(path, write)
    assert path.read_text() == "new"
    assert events == ["write", "flush", "replace"]
    assert list(path.parent.iterdir()) == [path]


def test_text_is_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "ε = 8\n")
    assert (tmp_path / "a.txt").read_bytes() == "ε = 8\n".encode()
