"""Participation without a run, and traces, for tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpeft_dist.config.load import parse_config
from fedpeft_dist.data.partition import IndexPartition, SharedPoolPartition
from fedpeft_dist.participation.plan import Participation

SAMPLES, PARAMETERS = 64, 1000


def make_participation(
    population: int | Sequence[int],
    cohort: int,
    seed: int = 1,
    client: dict[str, Any] | None = None,
    parameters: int = PARAMETERS,
    privacy: dict[str, Any] | None = None,
    **participation: Any,
) -> Participation:
    """
    Args:
        population: how many clients of SAMPLES each, or the size of every client.
        participation: the section's keys.
    """
    if isinstance(population, int):
        partition = SharedPoolPartition(population, SAMPLES, 4096)
    else:
        samples = torch.zeros(1, dtype=torch.int64).expand(sum(population))  # one in memory
        partition = IndexPartition(np.cumsum([0, *population]), samples)
    name = "pool" if privacy is None else "iid"  # sample-level privacy refuses a pool
    data = {"name": "synthetic", "clients": partition.num_clients, "partition": {"name": name}}
    federation = {"cohort": cohort, "participation": participation}
    tree = {"seed": seed, "data": data, "federation": federation, "client": client or {}}
    tree["privacy"] = privacy or {"name": "none"}
    return Participation(parse_config(tree, "test"), partition, parameters)


def write_trace(path: Path, columns: str, rows: Iterable[Sequence[Any]]) -> str:
    path.write_text("\n".join([columns, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return str(path)


AVAILABILITY = "client,start,end,available"
DROPOUT = "round,client,when"
DEVICES = "client,samples_per_second,uplink_bytes_per_second,downlink_bytes_per_second"
