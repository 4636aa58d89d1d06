"""The package against a bare loop in plain PyTorch, in turns: samples per second on the six workloads, and ratios.

    python benchmarks/against_loop.py [--workloads glyph head ...] [--ranks 1 | 2 | best] [--any] [--turns 5]

There are two loops, described in benchmarks/bare.py: one model on batches of 8 x B (`loop_8B`), and one client after
another in batches of B (`loop_B`). Both use all cores as threads, in fp32. The package runs as one rank with all cores
as threads and as one rank a core with one thread, and the better of both counts. `--any` adds the package in bf16 and
compiled, again against the loops in fp32. The workload `private` is compared with the same one without privacy.

The script prints one JSON object. A ratio is the median over the turns of the package's speed over the loop's.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import bare
import ours
from contest import Contestant, fastest, machine, race, ratio
from workloads import WORKLOADS, Workload, chosen, common_options

CORES = len(os.sched_getaffinity(0))


def main() -> None:
    parser = common_options(__doc__.splitlines()[0], list(WORKLOADS))
    parser.add_argument("--ranks", choices=["1", "2", "best"], default="best", help="ranks of the package")
    parser.add_argument("--any", action="store_true", help="also the package in bf16 and compiled")
    parser.add_argument("--lanes", default="auto")
    options = parser.parse_args()
    results = {name: compare(chosen(name, options), options) for name in options.workloads}
    print(json.dumps({"machine": machine(), "turns": options.turns, "workloads": results}, indent=1))


def compare(workload: Workload, options: argparse.Namespace) -> dict[str, Any]:
    plain = Workload(**{**vars(workload), "privacy": {"name": "none"}})
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "federation.safetensors")
        ours.federation_file(plain, file)
        contestants = packages(workload, options, "ours")
        if plain != workload:
            contestants |= packages(plain, options, "plain")
        loops = {
            f"loop_{what}": bare.contestant(plain, file, k, CORES) for what, k in (("8B", "batch"), ("B", "clients"))
        }
        results = race(contestants | loops, options.turns, options.seconds)
    best = {kind: fastest(results, names) for kind, names in kinds(contestants).items()}
    rivals = [best["plain"]] if "plain" in best else list(loops)
    ratios = {
        f"{kind} / {rival}": ratio(results, name, rival)
        for kind, name in best.items()
        for rival in rivals
        if name != rival
    }
    return {"ratios": ratios, "fastest": best, "contestants": results}


def packages(workload: Workload, options: argparse.Namespace, prefix: str) -> dict[str, Contestant]:
    """The package in every allowed number of ranks and precision."""
    ranks = {"1": [1], "2": [2], "best": [1, 2]}[options.ranks]
    lanes = options.lanes if options.lanes == "auto" else int(options.lanes)
    settings = {"fp32": {}}
    if options.any:
        settings |= {"bf16": {"precision": "bf16"}, "compiled": {"compile": True}}
        settings["bf16 compiled"] = {**settings["bf16"], **settings["compiled"]}
    return {
        f"{prefix}, {setting}, {count} x {max(1, CORES // count)}": ours.contestant(
            workload, count, max(1, CORES // count), lanes=lanes, **runtime
        )
        for setting, runtime in settings.items()
        for count in ranks
    }


def kinds(contestants: dict[str, Contestant]) -> dict[str, list[str]]:
    """The contestants of which the fastest counts: in fp32, and in any precision."""
    found = {"fp32": [n for n in contestants if n.startswith("ours, fp32")], "any": [], "plain": []}
    found["plain"] = [n for n in contestants if n.startswith("plain, fp32")]
    if any(n.startswith("ours, bf16") for n in contestants):
        found["any"] = [n for n in contestants if n.startswith("ours")]
    return {kind: names for kind, names in found.items() if names}


if __name__ == "__main__":
    main()
