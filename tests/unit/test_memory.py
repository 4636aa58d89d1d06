"""The memory left below the limits of control groups, version 1 and 2."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedpeft_dist.runtime.memory import available_host_memory, forget_peak_memory, peak_memory, used_memory

MIB = 1 << 20
FILES = {
    2: ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    1: ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def limit(root: Path, version: int, group: str, most: int | str, used: int, cached: int = 0) -> None:
    top, *names, cache = FILES[version]
    for name, value in zip(names, (most, used)):
        write(root / top / group / name, f"{value}\n")
    write(root / top / group / "memory.stat", f"anon 17\n{cache} {cached}\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "proc/meminfo", f"MemTotal: 99 kB\nMemAvailable:   {1000 * 1024} kB\nHugePages_Total: 0\n")
    return tmp_path


@pytest.mark.parametrize("version", [1, 2])
def test_the_smallest_limit_of_all_parent_groups_counts(root: Path, version: int) -> None:
    line = {1: "4:cpu,memory:/slurm/job_7/step_0\n3:cpuset:/", 2: "0::/slurm/job_7/step_0"}[version]
    write(root / "proc/self/cgroup", line + "\n")
    assert available_host_memory(root) == 1000 * MIB
    limit(root, version, "slurm/job_7/step_0", 9223372036854771712 if version == 1 else "max", 5 * MIB)
    assert available_host_memory(root) == 1000 * MIB
    limit(root, version, "slurm/job_7", 100 * MIB, 60 * MIB, cached=10 * MIB)
    assert available_host_memory(root) == 50 * MIB
    limit(root, version, "slurm", 80 * MIB, 70 * MIB)
    assert available_host_memory(root) == 10 * MIB
    limit(root, version, ".", 80 * MIB, 90 * MIB)
    assert available_host_memory(root) == 0


def test_control_groups_that_are_missing_or_unreadable(root: Path) -> None:
    assert available_host_memory(root) == 1000 * MIB
    write(root / "proc/self/cgroup", "0::/../outside\n1:name=systemd:/x\n")
    write(root / "sys/fs/cgroup/memory.max", "nonsense")
    write(root / "sys/fs/cgroup/memory.current", "3")
    assert available_host_memory(root) == 1000 * MIB


def test_memory_of_this_machine() -> None:
    assert available_host_memory() > MIB


def test_a_system_without_meminfo(tmp_path: Path) -> None:
    assert available_host_memory(tmp_path) > 100 * MIB


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
def test_the_peak_of_an_earlier_run_is_forgotten() -> None:
    device = torch.device("cpu")
    # Memory of its own, because malloc may keep what it frees, depending on what the process did before.
    with mmap.mmap(-1, 2**28) as large:
        for page in range(0, 2**28, mmap.PAGESIZE):
            large[page] = 1
        before, used = peak_memory(device), used_memory(device)
    forget_peak_memory(device)
    assert peak_memory(device) < before - 2**27
    assert used_memory(device) < used - 2**27


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
@pytest.mark.parametrize(("variables", "is_kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "65536"}, False)])
def test_freed_memory_is_kept_unless_the_environment_says_otherwise(variables: dict[str, str], is_kept: bool) -> None:
    code = """
import ctypes
import torch
from fedpeft_dist.runtime.memory import keep_freed_memory, used_memory
keep_freed_memory()
libc, device = ctypes.CDLL(None), torch.device("cpu")
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
blocks = [libc.malloc(2**22) for _ in range(64)]
for block in blocks:
    ctypes.memset(block, 1, 2**22)
before = used_memory(device)
for block in blocks:
    libc.free(block)
print(before - used_memory(device) < 2**27)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | variables
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(is_kept)
