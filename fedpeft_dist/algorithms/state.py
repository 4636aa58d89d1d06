"""What a run is between two rounds: a value. A round takes one and returns the next; a checkpoint is one on disk.

Shapes: P trainable parameters, S numbers that a client keeps, M cohort.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class State:
    """The same on every rank. Nothing in it is ever changed in place."""

    round: int
    """Rounds done."""
    vector: torch.Tensor
    """The global trainable parameters: float32 [P], on the device."""
    server: Tensors
    """The server optimizer's moments."""
    algorithm: Tensors
    """The algorithm's own tensors, and under user-level privacy the clipping norm."""
    clients: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """What clients keep between rounds, float32 [S] on the CPU each. Clients that have never taken part are absent."""
    totals: Mapping[str, float] = field(default_factory=dict)
    """Sums and records over the rounds, for the run's summary."""


def with_rows(
    clients: Mapping[int, torch.Tensor], changed: Sequence[int], rows: torch.Tensor
) -> dict[int, torch.Tensor]:
    """The clients' rows with those of some clients replaced.

    The new rows lie in a memory-mapped file without a name, so the system may move them out of memory. The file goes
    when no row of it is in use.

    Args:
        changed: the clients of the rows.
        rows: float32 [M, S].
    """
    with tempfile.TemporaryFile(prefix="fedpeft-clients-") as file:
        block = np.memmap(file, dtype=np.float32, mode="w+", shape=tuple(rows.shape))
    block[:] = rows.cpu().numpy()
    return {**clients, **dict(zip(changed, torch.from_numpy(block)))}
