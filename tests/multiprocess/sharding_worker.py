"""Run by test_sharding.py on each rank: every case once, in one process group, because start-up is expensive.

Prints nothing; leaves each run's folder below the path given.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from fedpeft_dist.config.load import parse_config
from fedpeft_dist.config.schema import RuntimeConfig
from fedpeft_dist.config.trees import merge_trees
from fedpeft_dist.federation.run import run
from fedpeft_dist.runtime import process
from tests.multiprocess.exactness_worker import ALGORITHMS, METHODS, make_config

SMALL = {
    "data": {"num_train": 200, "max_train": 150, "num_test": 70, "clients": 8},
    "federation": {"cohort": 5},
    "runtime": {"evaluate_batch": 16},
}
"""Keys that make a run shorter: 5 ragged clients, and 5 batches of evaluation."""

SECTIONS = {
    "scaffold": ALGORITHMS["scaffold"],
    "private": {"privacy": {"name": "sample", "epsilon": 8.0, "clip_norm": 1.0, "slots": 12}},
}
"""Cases beside the methods: bias tuning with a state per client, and with a gradient per sample."""


def main() -> None:
    output, cases = Path(sys.argv[1]), sys.argv[2].split(",")
    with process.start(RuntimeConfig(device="cpu")) as runtime:
        for case in cases:
            method, precision, size, lanes, offload, *half = case.split(":")
            precision, _, quantize = precision.partition("-")
            own = make_config(METHODS.get(method, METHODS["bias"]), output, name_of(case, runtime.world_size))
            tree = merge_trees(merge_trees(own, SMALL), SECTIONS.get(method, {}))
            tree["federation"]["rounds"] = 1 if half == ["first"] else 2
            sharding = {"size": int(size), "lanes": lanes, "offload": offload, "quantize": quantize or "none"}
            config = parse_config(merge_trees(tree, {"runtime": {"sharding": sharding}}), "test")
            run(config, runtime=replace(runtime, precision=precision))


def name_of(case: str, num_ranks: int) -> str:
    """The folder of a case's run. The first and the second half of a run have the same one."""
    method, precision, *_, last = case.split(":")
    if last in ("first", "second"):
        return f"halves-{method}-{precision}"
    return f"{num_ranks}-{case.replace(':', '-')}"
