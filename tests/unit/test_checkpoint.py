"""Checkpoints, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fedpeft_dist.algorithms.state import State, with_rows
from fedpeft_dist.checkpoint import (
    Checkpoint,
    Noise,
    Origin,
    _digest,
    load_newest_checkpoint,
    save_checkpoint,
    set_newer_aside,
)
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import config_digest, parse_config, with_values
from fedpeft_dist.runtime.files import remove_temporaries, write_atomically, write_text

CONFIG = parse_config({"runtime": {"device": "cpu"}}, "test")


def origin_of(number: int) -> Origin:
    return Origin.of(with_values(CONFIG, "federation", rounds=100 + number), f"{number:064x}", f"{number:032x}")


def checkpoint_of(next_round: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(next_round)
    vector = torch.randn(50, generator=generator)
    vector[:4] = torch.tensor([0.1, -0.0, 1e-42, 3e38])  # a subnormal and a negative zero must survive
    server = {"mean": torch.randn(50, generator=generator), "square": torch.rand(50, generator=generator)}
    totals = {"rejected": 3, "samples": 2**40, "seconds": 0.1 + 0.2}
    return Checkpoint(State(next_round, vector, server, {}, totals=totals), origin_of(next_round))


def checkpoint_with_rows() -> Checkpoint:
    """Under an algorithm whose clients keep rows, with an own tensor, and with noise."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(3, 7, generator=generator)
    rows[0, :3] = torch.tensor([-0.0, 1e-42, 3e38])
    state = replace(
        checkpoint_of(7).state,
        algorithm={"control": torch.randn(50, generator=generator)},
        clients=with_rows({}, [999_999_999, 0, 12], rows),
    )
    return Checkpoint(state, origin_of(7), Noise(torch.tensor([1.1, 0.0], dtype=torch.float64), 2**63 - 1))


def newest(directory: Path) -> Checkpoint | None:
    """The newest checkpoint, where none is damaged."""
    found, damaged = load_newest_checkpoint(directory)
    assert damaged == []
    return found


def assert_same(found: Checkpoint | None, expected: Checkpoint) -> None:
    assert found is not None
    ours, theirs = found.state, expected.state
    assert (ours.round, ours.totals, found.origin) == (theirs.round, theirs.totals, expected.origin)
    assert_same_bits({"vector": ours.vector}, {"vector": theirs.vector})
    assert_same_bits(ours.server, theirs.server)
    assert_same_bits(ours.algorithm, theirs.algorithm)
    assert_same_bits(ours.clients, theirs.clients)
    assert (found.noise is None) == (expected.noise is None)
    if expected.noise is not None:
        assert found.noise.seed == expected.noise.seed
        assert torch.equal(found.noise.multipliers, expected.noise.multipliers)


def assert_same_bits(found: Mapping[Any, torch.Tensor], expected: Mapping[Any, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.int32), tensor.view(torch.int32))


def test_a_checkpoint_comes_back_to_the_bit(tmp_path: Path) -> None:
    assert load_newest_checkpoint(tmp_path / "checkpoints") == (None, [])
    save_checkpoint(tmp_path / "checkpoints", checkpoint_of(7))
    assert_same(newest(tmp_path / "checkpoints"), checkpoint_of(7))


def test_clients_rows_and_noise_come_back_to_the_bit(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint_with_rows())
    assert_same(newest(tmp_path), checkpoint_with_rows())


def test_new_rows_leave_the_old_mapping_as_it_was() -> None:
    old = with_rows({}, [1, 5], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    new = with_rows(old, [5, 9], torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]))
    assert {client: row.tolist() for client, row in old.items()} == {1: [1.0, 2.0], 5: [3.0, 4.0]}
    assert {client: row.tolist() for client, row in new.items()} == {1: [1.0, 2.0], 5: [-1.0, -2.0], 9: [-3.0, -4.0]}


@pytest.mark.parametrize("number", [None, "1", "3"])
def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path, number: str | None) -> None:
    """It is whole, so the run must not begin anew or go back to an older checkpoint."""
    for next_round in (1, 2):
        save_checkpoint(tmp_path, checkpoint_of(next_round))
    path = tmp_path / "round-000002.safetensors"

    def change(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
        del metadata["format"], metadata["sha256"]
        if number is not None:
            metadata["format"] = number
        metadata["sha256"] = _digest(tensors, metadata)

    rewrite(path, change)
    with pytest.raises(ConfigError, match=r"a checkpoint of another version of fedpeft_dist; go on with") as error:
        load_newest_checkpoint(tmp_path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_checkpoint_tells_what_it_belongs_to(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint_of(7))
    origin = newest(tmp_path).origin
    config = parse_config(origin.config, "test")
    assert config.federation.rounds == 107
    assert origin.config_sha256 == config_digest(config)
    assert origin.config_sha256 != config_digest(CONFIG)
    assert origin.config_sha256 == config_digest(with_values(config, "output", name="elsewhere"))
    assert origin.versions["torch"] == torch.__version__
    assert origin.versions.keys() == {"fedpeft_dist", "torch", "timm", "numpy"}


def test_a_server_without_state_has_a_checkpoint_too(tmp_path: Path) -> None:
    expected = Checkpoint(State(0, torch.zeros(3), {}, {}), origin_of(0))
    save_checkpoint(tmp_path, expected)
    assert_same(newest(tmp_path), expected)


def test_views_and_strided_tensors_are_saved_as_they_look(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).view(3, 4)
    save_checkpoint(tmp_path, Checkpoint(State(1, matrix[:, 1], {"momentum": matrix[:, 1]}, {}), origin_of(1)))
    found = newest(tmp_path)
    assert found.state.vector.tolist() == found.state.server["momentum"].tolist() == [1.0, 5.0, 9.0]


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for next_round in (1, 2, 9, 10, 100):
        save_checkpoint(tmp_path, checkpoint_of(next_round))
        assert_same(newest(tmp_path), checkpoint_of(next_round))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["round-000010.safetensors", "round-000100.safetensors"]


def rewrite(path: Path, change: Callable[[dict, dict], None]) -> None:
    """Writes a checkpoint that safetensors can read, with other content."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(metadata, tensors)
    save_file(tensors, path, metadata=metadata)


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
        case "no digest":
            rewrite(path, lambda metadata, tensors: metadata.pop("sha256"))
        case "no vector":
            rewrite(path, lambda metadata, tensors: tensors.pop("vector"))
        case "another round":
            rewrite(path, lambda metadata, tensors: metadata.update(next_round="3"))
        case "another number":
            rewrite(path, lambda metadata, tensors: tensors["server.mean"][7:8].mul_(1 + 2e-7))
        case "another shape":
            rewrite(path, lambda metadata, tensors: tensors.update(vector=tensors["vector"].view(5, 10)))
        case "another name":
            rewrite(path, lambda metadata, tensors: tensors.update({"server.x": tensors.pop("server.mean")}))


WAYS = ["cut", "empty", "noise", "no metadata", "no digest", "no vector"]
WAYS += ["another round", "another number", "another shape", "another name"]


@pytest.mark.parametrize("how", WAYS)
def test_a_damaged_file_is_named_and_gives_way_to_the_one_before(tmp_path: Path, how: str) -> None:
    for next_round in (1, 2):
        save_checkpoint(tmp_path, checkpoint_of(next_round))
    path = tmp_path / "round-000002.safetensors"
    corrupt(path, how)
    found, damaged = load_newest_checkpoint(tmp_path)
    assert_same(found, checkpoint_of(1))
    assert len(damaged) == 1
    assert damaged[0].startswith(f"{path}: a damaged checkpoint (")
    assert "\n" not in damaged[0]


def test_where_all_are_damaged_there_is_none(tmp_path: Path) -> None:
    for next_round in (1, 2):
        save_checkpoint(tmp_path, checkpoint_of(next_round))
        corrupt(tmp_path / f"round-00000{next_round}.safetensors", "cut")
    found, damaged = load_newest_checkpoint(tmp_path)
    assert found is None
    assert [Path(line.split(":")[0]).name for line in damaged] == [f"round-00000{n}.safetensors" for n in (2, 1)]


def test_a_flipped_bit_anywhere_is_seen(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(2)
    path = save_checkpoint(tmp_path, checkpoint)
    content = path.read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        found, damaged = load_newest_checkpoint(tmp_path)
        if found is not None:  # only where it changes nothing: the header's padding, or an escape of a character
            assert_same(found, checkpoint)
        else:
            assert len(damaged) == 1


def test_a_file_that_cannot_be_read_is_no_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, checkpoint_of(1))

    def fail(path: Path, **_: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr("fedpeft_dist.checkpoint.safe_open", fail)
    with pytest.raises(ConfigError, match=r"round-000001\.safetensors: cannot be read \(Stale"):
        load_newest_checkpoint(tmp_path)


def test_damaged_files_do_not_push_good_ones_out(tmp_path: Path) -> None:
    """A run that goes on from round 5 with another `checkpoint_every` must not drop it for a damaged round 10."""
    for next_round in (5, 10):
        save_checkpoint(tmp_path, checkpoint_of(next_round))
    corrupt(tmp_path / "round-000010.safetensors", "cut")
    set_newer_aside(tmp_path, 5)
    save_checkpoint(tmp_path, checkpoint_of(6))
    assert_same(newest(tmp_path), checkpoint_of(6))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["damaged-round-000010.safetensors", "round-000005.safetensors", "round-000006.safetensors"]


STRAYS = [
    "round-000004 (copy).safetensors",
    "round-000004.safetensors.bak",
    "round-000004.bak.safetensors",
    "round-000004-old.safetensors",
    "round-latest.safetensors",
    "round-.safetensors",
    "round--00004.safetensors",
    "round-4.safetensors",
    "round-0000009.safetensors",
    "round-00000\N{ARABIC-INDIC DIGIT NINE}.safetensors",
    "round-000009\n.safetensors",
    "Round-000009.safetensors",
]


@pytest.mark.parametrize("kind", ["file", "folder", "symlink", "dangling symlink"])
@pytest.mark.parametrize("name", STRAYS)
def test_leaves_alone_what_has_another_name_than_a_checkpoint(tmp_path: Path, name: str, kind: str) -> None:
    newest_path = [save_checkpoint(tmp_path, checkpoint_of(next_round)) for next_round in (3, 4)][-1]
    stray = tmp_path / name
    match kind:
        case "file":
            stray.write_bytes(newest_path.read_bytes())
        case "folder":
            stray.mkdir()
        case "symlink":
            stray.symlink_to(newest_path)
        case "dangling symlink":
            stray.symlink_to("nowhere")
    before = stray.lstat().st_ino
    assert_same(newest(tmp_path), checkpoint_of(4))
    set_newer_aside(tmp_path, 4)
    remove_temporaries(tmp_path)
    for next_round in (5, 6, 7):
        save_checkpoint(tmp_path, checkpoint_of(next_round))
    assert_same(newest(tmp_path), checkpoint_of(7))
    assert stray.lstat().st_ino == before


def test_names_a_checkpoint_that_stands_under_another_round(tmp_path: Path) -> None:
    """Such a copy must not take the run back behind the newest checkpoint."""
    for next_round in (3, 4):
        save_checkpoint(tmp_path, checkpoint_of(next_round))
    copy = tmp_path / "round-000009.safetensors"
    copy.write_bytes((tmp_path / "round-000003.safetensors").read_bytes())
    found, damaged = load_newest_checkpoint(tmp_path)
    assert_same(found, checkpoint_of(4))
    assert damaged == [f"{copy}: a damaged checkpoint (it holds the state after round 3)"]


def test_sets_a_folder_aside_that_has_the_name_of_a_later_checkpoint(tmp_path: Path) -> None:
    for next_round in (3, 4):
        save_checkpoint(tmp_path, checkpoint_of(next_round))
    for name in ("round-000002.safetensors", "round-000005.safetensors", ".tmp-notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").touch()
    found, damaged = load_newest_checkpoint(tmp_path)
    assert_same(found, checkpoint_of(4))
    assert damaged == [f"{tmp_path / 'round-000005.safetensors'}: a damaged checkpoint (a folder)"]
    set_newer_aside(tmp_path, 4)
    remove_temporaries(tmp_path)
    for next_round in (5, 6):
        save_checkpoint(tmp_path, checkpoint_of(next_round))
    assert_same(newest(tmp_path), checkpoint_of(6))
    kept = sorted(path.parent.name for path in tmp_path.rglob("notes.txt"))
    assert kept == [".tmp-notes", "damaged-round-000005.safetensors", "round-000002.safetensors"]


def test_follows_a_link_that_has_a_checkpoints_name(tmp_path: Path) -> None:
    """Some keep their checkpoints on another disk; one that is not there is told instead of starting anew."""
    path = save_checkpoint(tmp_path, checkpoint_of(4))
    elsewhere = path.rename(tmp_path / "elsewhere")
    path.symlink_to(elsewhere)
    assert_same(newest(tmp_path), checkpoint_of(4))
    elsewhere.unlink()
    with pytest.raises(ConfigError, match=r"round-000004\.safetensors: cannot be read \(No such file"):
        load_newest_checkpoint(tmp_path)


def test_a_write_that_was_killed_leaves_no_checkpoint(tmp_path: Path) -> None:
    """A process that dies while writing leaves its temporary file, which is not taken for a checkpoint and removed."""
    save_checkpoint(tmp_path, checkpoint_of(1))
    temporary: list[Path] = []
    write_atomically(tmp_path / "round-000002.safetensors", lambda path: (temporary.append(path), path.touch()))
    (tmp_path / "round-000002.safetensors").rename(temporary[0])
    assert_same(newest(tmp_path), checkpoint_of(1))
    remove_temporaries(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["round-000001.safetensors"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for next_round in (1, 2):
        save_checkpoint(tmp_path, checkpoint_of(next_round))
    monkeypatch.setattr(os, "fsync", fail_with_full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, checkpoint_of(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"round-00000{n}.safetensors" for n in (1, 2)]
    assert_same(newest(tmp_path), checkpoint_of(2))


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
    flush, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("flush"), flush(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), rename(a, b)))

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
