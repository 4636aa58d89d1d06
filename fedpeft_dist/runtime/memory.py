"""How much of a machine's memory can still be had: what the kernel says, or a control group's limit if that is less.

Slurm (--mem), containers and systemd limit their processes by Linux's control groups, of which the machine's own figure
says nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")


def available_host_memory(root: Path = _ROOT) -> int:
    """Bytes that this process can take without swapping; where the kernel does not tell, half of what is installed.

    Args:
        root: of the file system in which /proc and /sys are looked for.
    """
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return min([int(fields["MemAvailable"].split()[0]) * 1024, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """Bytes left below the limit of each control group that this process is in, of either version."""
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
        for folder in (group, *group.parents):  # a limit further up holds here, too
            if not folder.is_relative_to(top):
                break
            try:
                most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
                statistics = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # a container may not see its own group's place
                continue
            if most != "max":
                # Files' pages count as used, but give way.
                yield max(0, int(most) - used + int(statistics.get(cache, 0)))
