"""Measures seconds and memory to plan, without training, rounds over 1,000,000 clients with traces.

    python benchmarks/participation.py [rounds] [clients]

Availability (three intervals a client), dropout and devices come from CSV files. There is over-selection, and a
deadline that some clients meet with a part of their work. The default is 10,000 rounds.

The script prints one JSON object. For each kind of sampling it holds two times: to read the
traces (`open_seconds`) and to plan all rounds (`plan_seconds`). It also counts what became of the clients.
`seconds_per_round_of_nobody` belongs to a round in which no client is available; such a round looks through the whole
population.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft_dist.config.load import parse_config
from fedpeft_dist.data.partition import SharedPoolPartition
from fedpeft_dist.lanes.wire import Traffic
from fedpeft_dist.participation.plan import Participation

COHORT, SAMPLES, BYTES = 50, 64, 400_000
DAY = 86_400


def main() -> None:
    rounds, clients = (int(sys.argv[n]) if len(sys.argv) > n else 10_000 * 100 ** (n - 1) for n in (1, 2))
    with tempfile.TemporaryDirectory() as folder:
        traces = write_traces(Path(folder), rounds, clients)
        found = {name: measure(name, traces, rounds, clients) for name in ("uniform", "poisson", "weighted")}
        traces["availability"] = {"name": "diurnal", "low": 0.0, "spread": 0.0}
        night = measure("uniform", {**traces, "seconds_per_round": 1e-9}, 20, clients)["plan_seconds"] / 20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    setting = {"rounds": rounds, "clients": clients, "cohort": COHORT, "peak_memory_bytes": peak}
    print(json.dumps({**setting, "seconds_per_round_of_nobody": night, "runs": found}))


def write_traces(folder: Path, rounds: int, clients: int) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    ids, zeros = np.arange(clients), np.zeros(clients, dtype=np.int64)
    first, second = np.sort(rng.integers(1, DAY - 60, size=(2, clients)), axis=0)
    second += 30
    awake = rng.integers(0, 2, size=clients)  # at midnight
    intervals = ((zeros, first, awake), (first, second, 1 - awake), (second, zeros + DAY, awake))
    available = np.concatenate([np.stack([ids, *interval], axis=1) for interval in intervals])
    speeds = np.exp(rng.standard_normal((clients, 3))) * (100, 1e6, 4e6)
    losses = np.stack([1 + ids % rounds, rng.permutation(clients)], axis=1)
    tables = {
        "availability": ("client,start,end,available", available, "%d,%d,%d,%d"),
        "dropout": ("round,client,when", losses, "%d,%d,during"),
        "devices": (
            "client,samples_per_second,uplink_bytes_per_second,downlink_bytes_per_second",
            np.column_stack([ids, speeds]),
            "%d,%.4g,%.4g,%.4g",
        ),
    }
    for name, (columns, rows, form) in tables.items():
        np.savetxt(folder / f"{name}.csv", rows, fmt=form, header=columns, comments="")
    return {name: {"name": "trace", "path": str(folder / f"{name}.csv")} for name in tables}


def measure(name: str, traces: dict[str, Any], rounds: int, clients: int) -> dict[str, float]:
    settings = {"name": name, "seconds_per_round": 300.0, "deadline": 10.0, "late": "partial", **traces}
    settings["over_selection"] = 1.0 if name == "poisson" else 1.3
    tree = {
        "data": {"name": "synthetic", "clients": clients, "partition": {"name": "pool", "samples": SAMPLES}},
        "federation": {"rounds": rounds, "cohort": COHORT, "participation": settings},
        "client": {"epochs": 5, "batch_size": 16},
    }
    config, partition = parse_config(tree, "benchmark"), SharedPoolPartition(clients, SAMPLES, 4096)
    started = time.perf_counter()
    participation = Participation(config, partition, Traffic(BYTES, BYTES))
    participation.check()
    opened = time.perf_counter()
    sums: dict[str, float] = {}
    for number in range(rounds):
        for key, value in participation.plan(number).figures().items():
            sums[key] = sums.get(key, 0) + value
    planned = time.perf_counter()
    return {"open_seconds": opened - started, "plan_seconds": planned - opened, **sums}


if __name__ == "__main__":
    main()
