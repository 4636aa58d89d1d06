"""Participation without a run, and trace files, for tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpeft_dist.config.load import parse_config
from fedpeft_dist.data.partition import IndexPartition, SharedPoolPartition
from fedpeft_dist.lanes.wire import Traffic
from fedpeft_dist.participation.plan import Participation

SAMPLES, BYTES = 64, 4000


def make_participation(
    population: int | Sequence[int],
    cohort: int,
    seed: int = 1,
    client: dict[str, Any] | None = None,
    bytes_per_client: int = BYTES,
    privacy: dict[str, Any] | None = None,
    **participation: Any,
) -> Participation:
    """The participation of a config.

    Args:
        population: number of clients, each with SAMPLES samples; or the size of every client.
        participation: keys of the section `federation.participation`.
    """
    if isinstance(population, int):
        partition = SharedPoolPartition(population, SAMPLES, 4096)
    else:
        samples = torch.zeros(1, dtype=torch.int64).expand(sum(population))  # one number in memory
        partition = IndexPartition(np.cumsum([0, *population]), samples)
    name = "pool" if privacy is None else "iid"  # sample-level privacy refuses a pool
    data = {"name": "synthetic", "clients": partition.num_clients, "partition": {"name": name}}
    federation = {"cohort": cohort, "participation": participation}
    tree = {"seed": seed, "data": data, "federation": federation, "client": client or {}}
    tree["privacy"] = privacy or {"name": "none"}
    return Participation(parse_config(tree, "test"), partition, Traffic(bytes_per_client, bytes_per_client))


def write_trace(path: Path, columns: str, rows: Iterable[Sequence[Any]]) -> str:
    path.write_text("\n".join([columns, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return str(path)


AVAILABILITY = "client,start,end,available"
DROPOUT = "round,client,when"
DEVICES = "client,samples_per_second,uplink_bytes_per_second,downlink_bytes_per_second"
