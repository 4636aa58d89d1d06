"""The share of a machine that each of several workers gets: a GPU, or some cores if there are no GPUs.

PyTorch is not asked for the GPUs, because it would open them in a process that only looks after others.
"""

import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from fedpeft_dist.sweeps.expansion import Cell


@dataclass(frozen=True)
class Place:
    """A worker's share of the machine, where one cell at a time runs."""

    name: str
    environment: Mapping[str, str]
    cpus: frozenset[int] | None = None
    """The CPUs to run on; None leaves the choice to the system."""

    @contextmanager
    def starting_here(self) -> Iterator[None]:
        """Processes that are started in this context inherit these CPUs."""
        if self.cpus is None:
            yield
            return
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self.cpus)
        try:
            yield
        finally:
            os.sched_setaffinity(0, allowed)


def find_places(cells: Sequence[Cell], num_workers: int | None, cores: int | None) -> list[Place]:
    """A place for each worker, on a GPU or on cores of its own.

    Args:
        num_workers: None takes as many as there are GPUs, or as the cores suffice for. More workers share the GPUs.
        cores: the cores of a worker; None takes as many as the cells have threads.
    """
    pin = num_workers is None or cores is not None  # a mere number of workers may leave cores free on purpose
    cores = cores or max(cell.config.runtime.threads for cell in cells)
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores))}
    gpus = [] if all(cell.config.runtime.device == "cpu" for cell in cells) else find_gpus()
    if gpus:
        numbers = [i % len(gpus) for i in range(num_workers or len(gpus))]
        return [Place(f"gpu {i}", {**threads, "CUDA_VISIBLE_DEVICES": gpus[i]}) for i in numbers]
    can_pin = hasattr(os, "sched_setaffinity")
    cpus = sorted(os.sched_getaffinity(0)) if can_pin else list(range(os.cpu_count() or 1))
    num_workers = num_workers or max(1, len(cpus) // cores)
    if not (can_pin and pin and num_workers * cores <= len(cpus)):
        return [Place(f"worker {i}", threads) for i in range(num_workers)]
    shares = [cpus[i * cores : (i + 1) * cores] for i in range(num_workers)]
    return [Place("cpu " + ",".join(map(str, share)), threads, frozenset(share)) for share in shares]


def find_gpus() -> list[str]:
    """The name in CUDA_VISIBLE_DEVICES of each GPU that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        ends = (i for i, name in enumerate(names) if name in ("", "-1"))  # CUDA ignores the names after these
        return names[: next(ends, len(names))]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    # UUIDs, because nvidia-smi and CUDA may number GPUs differently. A split GPU is replaced by its parts.
    return re.findall(r"\(UUID: (MIG-[^)]+|GPU-[^)]+(?!\)\n\s+MIG))\)", listed)
