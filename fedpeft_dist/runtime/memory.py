"""How much of a machine's memory is available, and how much a process has taken.

Available is the kernel's figure, or less if a control group has less left. Slurm (--mem), containers and systemd limit
their processes by Linux's control groups, which the kernel's figure does not include.
"""

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's malloc.h, for `mallopt`."""
KEPT = 2**23
"""Bytes up to which a freed block is kept. Gaps between kept blocks of any size would take a third more memory."""


def available_host_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can take without swapping; half of the installed memory if the kernel does not tell.

    The folder `root` holds proc and sys.
    """
    with suppress(FileNotFoundError):
        return min([_figure(root / "proc/meminfo", "MemAvailable"), *_left_in_groups(root)])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _left_in_groups(root: Path) -> Iterator[int]:
    """Bytes left below the limit of each control group (version 1 or 2) that this process is in."""
    table = root / "proc/self/cgroup"
    for line in table.read_text().splitlines() if table.exists() else ():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, limit, usage, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            limit, usage, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):  # the limits of parent groups hold, too
            if not folder.is_relative_to(top):
                break
            with suppress(OSError, ValueError):  # a container may not see its own group; a limit may be "max"
                left = int((folder / limit).read_text()) - int((folder / usage).read_text())
                # Cached files count as used, but the kernel drops them when memory is needed.
                statistics = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
                yield max(0, left + int(statistics.get(cache, 0)))


def keep_freed_memory() -> None:
    """Lets malloc keep freed blocks of up to 8 MiB for later tensors, as PyTorch's allocator does on a GPU.

    Otherwise the kernel has to find and clear the pages of most tensors of a local step again. Systems without glibc
    stay as they are, and so does a process whose environment sets these thresholds itself.
    """
    if any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")):
        return
    with suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def free_device_memory(device: torch.device, sharers: int = 1) -> int:
    """Bytes of a GPU that this process can still take. Processes that share the GPU get equal parts of its memory."""
    torch.cuda.empty_cache()  # returns what PyTorch keeps for later tensors
    free, total = torch.cuda.mem_get_info(device)
    return max(0, min(free, total // sharers - torch.cuda.memory_reserved(device))) if sharers > 1 else free


def used_memory(device: torch.device) -> int:
    """Bytes that this process has now: allocated on the GPU, or resident in memory."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _own_memory("VmRSS")


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had since the last `forget_peak_memory`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _own_memory("VmHWM")


def forget_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps of an earlier run
    with suppress(OSError):  # no Linux, or a container that forbids it
        Path("/proc/self/clear_refs").write_text("5")


def return_large_blocks() -> None:
    """Has glibc give the memory of every freed tensor of a MiB or more back to the system at once, from now on.

    It would keep gathered weights' memory in gaps between longer-lived tensors, and take more for the next ones.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


def _own_memory(field: str) -> int:
    """A figure of this process; its peak since it started if the kernel does not tell more."""
    with suppress(FileNotFoundError):
        return _figure(Path("/proc/self/status"), field)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _figure(file: Path, field: str) -> int:
    """The bytes that one of the kernel's files tells in kB."""
    fields = dict(line.split(":", 1) for line in file.read_text().splitlines())
    return int(fields[field].split()[0]) * 1024
