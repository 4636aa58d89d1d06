"""The share of a machine that each worker of a sweep gets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedpeft_dist.config.load import with_values
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.sweeps.attempts import find_gpus, find_places
from fedpeft_dist.sweeps.expansion import Cell

LISTED = """\
GPU 0: NVIDIA A100 (UUID: GPU-aaa)
GPU 1: NVIDIA A100 (UUID: GPU-bbb)
  MIG 3g.20gb     Device  0: (UUID: MIG-ccc)
  MIG 3g.20gb     Device  1: (UUID: MIG-ddd)
GPU 2: NVIDIA A100 (UUID: GPU-eee)
"""


def cell(device: str = "auto", threads: int = 1) -> Cell:
    return Cell(0, "a", with_values(RunConfig(), "runtime", device=device, threads=threads))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight CPUs, of which this process may use six, and no GPU."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5, 6, 7}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: None, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def install_nvidia_smi(folder: Path, code: int = 0) -> None:
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\nprintf '%s' '{LISTED}'\nexit {code}\n")
    script.chmod(0o755)


def test_finds_the_visible_gpus(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_gpus() == []
    install_nvidia_smi(machine, code=9)
    assert find_gpus() == []  # it is there, but finds no driver
    install_nvidia_smi(machine)
    assert find_gpus() == ["GPU-aaa", "MIG-ccc", "MIG-ddd", "GPU-eee"]
    for visible, expected in (("", []), ("-1", []), ("2", ["2"]), ("1, 0", ["1", "0"]), ("0,-1,1", ["0"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert find_gpus() == expected


def test_each_gpu_has_a_worker_and_more_workers_share_gpus(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    for num_workers, expected in ((None, ["2", "3"]), (1, ["2"]), (3, ["2", "3", "2"])):
        places = find_places([cell("cpu"), cell()], num_workers, None)
        assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in places] == expected
        sharers = [str(expected.count(gpu)) for gpu in expected]
        assert [place.environment["FEDPEFT_GPU_SHARERS"] for place in places] == sharers
        assert all(place.cpus is None for place in places)
    assert [place.name for place in find_places([cell("cpu")], None, 3)] == ["cpu 0,1,2", "cpu 5,6,7"]


@pytest.mark.parametrize(
    ("num_workers", "cores", "threads", "expected"),
    [
        (None, None, 1, [{0}, {1}, {2}, {5}, {6}, {7}]),
        (None, None, 2, [{0, 1}, {2, 5}, {6, 7}]),
        (None, 4, 1, [{0, 1, 2, 5}]),
        (2, 2, 1, [{0, 1}, {2, 5}]),
        (2, None, 1, [None, None]),
        (4, 2, 1, [None] * 4),
        (None, 7, 1, [None]),
    ],
)
def test_allowed_cores_are_divided_among_the_workers(
    machine: Path, num_workers: int | None, cores: int | None, threads: int, expected: list[set[int] | None]
) -> None:
    places = find_places([cell(), cell(threads=threads)], num_workers, cores)
    assert [place.cpus for place in places] == expected
    assert {place.environment["OMP_NUM_THREADS"] for place in places} == {str(cores or threads)}
