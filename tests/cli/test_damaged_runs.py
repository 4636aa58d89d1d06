"""Checkpoints that cannot be written, and checkpoints that come back damaged: told in one line, and nothing is lost."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fedpeft_dist.algorithms.state import State
from fedpeft_dist.checkpoint import Checkpoint, Origin, load_newest_checkpoint, save_checkpoint
from fedpeft_dist.tracking.run_directory import COMPLETE, FAILED, RunDirectory
from tests import real_runs
from tests.real_runs import TRACE, Launched, complete, differences, run_of, start, wait_for_rounds

ROUNDS = 20


def write_config(folder: Path, name: str = "run", rounds: int = ROUNDS) -> Path:
    """Of full fine-tuning, so that a checkpoint is large beside all else that a run writes."""
    return real_runs.write_config(folder, name, rounds, method="full")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The run that nobody disturbs."""
    config = write_config(tmp_path_factory.mktemp("whole"))
    complete(config)
    return run_of(config)


def told(output: str) -> list[str]:
    """The lines that are no progress."""
    return [line for line in output.splitlines() if ": round " not in line and "going on after" not in line]


# --- no room -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, leave: int) -> None:
    """Takes the room that is left in a file system but for so many bytes."""
    with open(folder / "filler", "ab", buffering=0) as filler:
        while (room := free_bytes(folder) - leave) > 0:
            try:
                filler.write(bytes(min(room, 2**16)))
            except OSError:  # somebody else was faster
                return


def free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


@pytest.mark.parametrize(("leave", "ranks"), [(0, 1), pytest.param(2**16, 2, marks=pytest.mark.slow)])
def test_a_full_disk_in_mid_run(small_disk: Path, whole: RunDirectory, leave: int, ranks: int) -> None:
    """Nothing may be left, or room for lines of metrics and a state, but not for a checkpoint."""
    config = write_config(small_disk)
    run = run_of(config)
    with start(config, ranks) as launched:
        wait_for_rounds(launched, run, 3)
        while launched.process.poll() is None and launched.seconds < 120:
            fill(small_disk, leave)  # again and again: an old checkpoint that goes makes room
            time.sleep(0.01)
        assert_told_no_room(launched, ranks, run.checkpoints if leave else run.path, "No space left on device")
    if leave:
        assert run.read_state()["state"] == FAILED
    (small_disk / "filler").unlink()
    assert "going on after round" in complete(config, ranks)
    assert not differences(run, whole)


def test_a_checkpoint_beyond_the_size_that_files_may_have(tmp_path: Path, whole: RunDirectory) -> None:
    """Where nobody may mount a small disk, a limit that is set in mid-run stands for one."""
    config = write_config(tmp_path)
    run = run_of(config)
    with start(config) as launched:
        wait_for_rounds(launched, run, 3)
        limit = min(path.stat().st_size for path in run.checkpoints.glob("round-*")) // 2
        resource.prlimit(launched.process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        assert_told_no_room(launched, 1, run.checkpoints, "File too large")
    assert run.read_state()["state"] == FAILED
    assert "going on after round" in complete(config)
    assert not differences(run, whole)


def assert_told_no_room(launched: Launched, ranks: int, path: Path, reason: str) -> None:
    code, output = launched.wait(timeout=120), launched.output
    errors = [line for line in told(output) if line.startswith("error: ")]
    # Of two ranks, the one that does not write may say why it ends, too.
    named = [line for line in errors if "its own error says why" not in line]
    assert len(named) == 1, output
    assert str(path) in named[0]
    assert reason in named[0]
    assert len(errors) <= ranks, output
    assert TRACE not in output
    assert code == (2 if ranks == 1 else 1), output  # torchrun has codes of its own
    if ranks == 1:
        assert told(output) == errors


# --- damaged -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight rounds that is there to be made longer; it has the checkpoints of the last two."""
    config = write_config(tmp_path_factory.mktemp("begun"), rounds=8)
    complete(config)
    return run_of(config).path


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    """A bit in the middle of the last tensor."""
    content = bytearray(path.read_bytes())
    content[-500] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "num_damaged", "ranks"), [(flip, 1, 2), (cut, 1, 1), pytest.param(empty, 2, 1, marks=pytest.mark.slow)]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    tmp_path: Path, begun: Path, whole: RunDirectory, damage: Callable[[Path], None], num_damaged: int, ranks: int
) -> None:
    config = write_config(tmp_path)
    run = run_of(config)
    shutil.copytree(begun, run.path)
    assert run.read_state()["state"] == COMPLETE
    paths = sorted(run.checkpoints.iterdir(), reverse=True)[:num_damaged]
    for path in paths:
        damage(path)
    output = complete(config, ranks)
    for path in paths:
        assert sum(str(path) in line for line in output.splitlines()) == 1, output
    assert "Traceback" not in output
    assert ("going on after round 7\n" in output) == (num_damaged == 1)
    assert ("run: round 1/" in output) == (num_damaged == 2)
    for path in paths:
        path.with_name(f"damaged-{path.name}").unlink()  # kept, for whoever wants to know what befell it
    assert not differences(run, whole)


@pytest.fixture
def newest(tmp_path: Path) -> Path:
    """The second of two small checkpoints."""
    for next_round in (1, 2):
        vector = torch.linspace(-1, 1, 6) * next_round
        server = {"mean": vector / 2, "square": vector**2}
        totals = {"rejected": 0, "samples": 64 * next_round, "seconds": 0.5, "best_accuracy": 0.25}
        origin = Origin({"seed": 1}, "ef" * 32, "ab" * 32, "cd" * 32)
        path = save_checkpoint(tmp_path, Checkpoint(State(next_round, vector, server, {}, totals=totals), origin))
    assert load_newest_checkpoint(tmp_path)[0].state.round == 2
    return path


def assert_the_one_before_is_taken(newest: Path, what: object) -> None:
    found, damaged = load_newest_checkpoint(newest.parent)
    assert found.state.round == 1, what
    assert len(damaged) == 1
    assert damaged[0].startswith(f"{newest}: ")
    assert "\n" not in damaged[0]


def test_a_bit_that_flips_in_any_byte_is_noticed(newest: Path) -> None:
    content = newest.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        newest.write_bytes(damaged)
        assert_the_one_before_is_taken(newest, place)


def test_every_length_that_a_checkpoint_is_cut_to_is_noticed(newest: Path) -> None:
    content = newest.read_bytes()
    for length in range(len(content)):
        newest.write_bytes(content[:length])
        assert_the_one_before_is_taken(newest, length)
    newest.write_bytes(content + b"\0")
    assert_the_one_before_is_taken(newest, "longer")
