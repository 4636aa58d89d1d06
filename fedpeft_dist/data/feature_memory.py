"""Memory for features: on the device, else on the host, else in a file without a name that is mapped into memory.

Shapes: n rows.
"""

import errno
import math
import mmap
import os
import shutil
import tempfile
from pathlib import Path

import torch

from fedpeft_dist.runtime.files import DISK_FULL
from fedpeft_dist.runtime.memory import available_host_memory, free_device_memory
from fedpeft_dist.runtime.process import Runtime

MEMORY_SHARE = 0.25
"""The share of the free memory of a device or of a machine that features may take. Lanes take most of the rest."""
DISK_SHARE = 0.5
"""The share of the free disk that the features of a machine's ranks may take."""


def allocate(
    shape: tuple[int, ...], dtype: torch.dtype, runtime: Runtime, folder: Path, taken: int = 0
) -> torch.Tensor | None:
    """Rows [n, ...] in the fastest memory that has room for them; None if there is none. Their content is undefined.

    Args:
        taken: bytes allocated before, which the system counts as free until they are filled.
        folder: where the file is made, if it comes to that. It vanishes with the process.
    """
    size = math.prod(shape) * dtype.itemsize
    ranks = runtime.launch.local_world_size
    if runtime.device.type == "cuda":
        free = free_device_memory(runtime.device, runtime.launch.gpu_sharers)
        if size <= MEMORY_SHARE * free:
            return torch.empty(shape, dtype=dtype, device=runtime.device)
    if taken + size <= MEMORY_SHARE * available_host_memory() / ranks:
        return torch.empty(shape, dtype=dtype)
    if size <= DISK_SHARE * shutil.disk_usage(folder).free / ranks:
        return _map_file(shape, dtype, size, folder)
    return None


def _map_file(shape: tuple[int, ...], dtype: torch.dtype, size: int, folder: Path) -> torch.Tensor | None:
    """None if the disk is full, or its files cannot be reserved or mapped."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a disk that fills up later would kill the process
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype).view(shape)
    except OSError as error:
        if error.errno not in (*DISK_FULL, errno.EINVAL, errno.ENODEV, errno.EOPNOTSUPP):
            raise
        return None
