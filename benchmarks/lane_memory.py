"""The memory of a lane, method by method, and how well `runtime.lanes: auto` foresees it.

    python benchmarks/lane_memory.py [--methods head bias ...] [--mebibytes 1024]

`lanes: auto` is told that a certain memory is free and chooses lanes for it. A round then trains with so many lanes,
and another with half as many. `bytes_per_lane` comes from the difference of the two peaks. `real_over_estimate` is the
peak of the chosen lanes, beyond the memory before the round, over the share of the memory that `auto` meant to use.
Each figure comes from a process of its own, because memory that a process has once had may stay with it.

The script prints one JSON object. The model is the workload glyph's, with batches of 16 and AdamW, whose state is the
largest.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from unittest import mock

from contest import machine
from ours import METHODS, Rounds
from workloads import FEW_METHODS, WORKLOADS, common_options

from fedpeft_dist.config.load import parse_config
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.runtime import process
from fedpeft_dist.runtime.memory import forget_peak_memory, peak_memory, used_memory
from fedpeft_dist.training import lane_count

MOST_LANES = 4096


def main() -> None:
    parser = common_options(__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=FEW_METHODS, choices=list(METHODS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--mebibytes", type=int, default=1024, help="the memory that `lanes: auto` is told is free")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(**json.loads(options.case))))
        return
    free = 2**20 * (16 if options.tiny else options.mebibytes)
    results = {}
    for method in options.methods:
        whole = in_own_process(method=method, free=free, device=options.device)
        half = in_own_process(method=method, free=free, device=options.device, lanes=max(1, whole["lanes"] // 2))
        apart = max(1, whole["lanes"] - half["lanes"])
        results[method] = {
            "lanes": whole["lanes"],
            "bytes_per_lane": (whole["bytes"] - half["bytes"]) / apart,
            "real_over_estimate": whole["bytes"] / (lane_count.MEMORY_SHARE * free),
        }
    print(json.dumps({"machine": machine(), "free_bytes": free, "methods": results}, indent=1))


def in_own_process(**case: object) -> dict[str, int]:
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def measure(method: str, free: int, device: str, lanes: int | str = "auto") -> dict[str, int]:
    """The lanes of a round, and its peak memory beyond what there was before."""
    config = make_config(method, device, lanes)
    with mock.patch.object(lane_count, "_free_memory", return_value=free), process.start(config.runtime) as runtime:
        chosen = Rounds(config, runtime).simulation.config.runtime.lanes
        rounds = Rounds(make_config(method, device, chosen), runtime)  # nothing of the choice is left in it
        before = used_memory(runtime.device)
        forget_peak_memory(runtime.device)
        rounds.run(1)
        return {"lanes": chosen, "bytes": peak_memory(runtime.device) - before}


def make_config(method: str, device: str, lanes: int | str) -> RunConfig:
    """One local step of each lane. A client's samples are a window of a pool, so that many clients cost nothing."""
    glyph = WORKLOADS["glyph"]
    cohort = MOST_LANES if lanes == "auto" else lanes
    tree = glyph.tree(device=device, lanes=lanes)
    tree["method"] = METHODS[method]
    tree["data"] |= {"num_train": 256, "clients": MOST_LANES, "partition": {"name": "pool", "samples": glyph.batch}}
    tree["federation"]["cohort"] = cohort
    tree["client"] = {"epochs": 1, "batch_size": glyph.batch, "optimizer": {"name": "adamw"}}
    return parse_config(tree, "benchmark")


if __name__ == "__main__":
    main()
