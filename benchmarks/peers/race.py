"""The same federation in this package, in pfl-research and in Flower, in turns: samples per second and ratios.

    python benchmarks/peers/race.py --python peers/bin/python [--workloads overhead glyph head] [--turns 5]

All have the same model, data, clients, cohort size, batch size, epochs and client optimizer, in fp32 on all cores. Each
runs as one process with all cores as threads and as one process a core with one thread, and its better one counts.
benchmarks/peers/requirements.txt says what `--python` must have.

Before the race, each of them trains one round in which all clients take part, with one batch of all of a client's
samples, so that no order of samples can differ. `check` tells how many samples each went through, and by how much its
global tensors differ from this package's, as a share of the largest change of any tensor in that round.

The script prints one JSON object. A ratio is the median over the turns of the package's speed over the peer's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import bare
import ours
from contest import Contestant, fastest, machine, race, ratio
from safetensors.torch import load_file
from workloads import Workload, chosen, common_options

CORES = len(os.sched_getaffinity(0))
PEERS = ("pfl", "flower")
LARGEST_DIFFERENCE = 1e-3
"""Share of the round's largest change by which rounding may move a tensor."""


def main() -> None:
    parser = common_options(__doc__.splitlines()[0], ["overhead", "glyph", "head"])
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has the peers")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    options = parser.parse_args()
    results = {name: compare(chosen(name, options), options) for name in options.workloads}
    print(json.dumps({"machine": machine(), "turns": options.turns, "workloads": results}, indent=1))


def compare(workload: Workload, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        same = check(workload, options, Path(folder))
        file = str(Path(folder) / "federation.safetensors")
        ours.federation_file(workload, file)
        contestants = {}
        for count in sorted({1, CORES}):
            for name, contestant in field(workload, file, count, CORES // count, options).items():
                contestants[f"{name}, {count} x {CORES // count}"] = contestant
        results = race(contestants, options.turns, options.seconds)
    names = ["ours", *options.peers]
    best = {name: fastest(results, [n for n in contestants if n.startswith(name)]) for name in names}
    ratios = {f"ours / {peer}": ratio(results, best["ours"], best[peer]) for peer in options.peers}
    return {"ratios": ratios, "fastest": best, "check": same, "contestants": results}


def field(
    workload: Workload, file: str, processes: int, threads: int, options: argparse.Namespace
) -> dict[str, Contestant]:
    argument, python = {"workload": vars(workload), "file": file}, options.python
    own = {"processes": processes, "threads": threads}
    everyone = {
        "ours": ours.contestant(workload, processes, threads),
        "pfl": Contestant("peers/pfl_worker.py", argument, threads, processes, python),
        "flower": Contestant("peers/flower_worker.py", argument | own, threads, python=python),
    }
    return {name: everyone[name] for name in ("ours", *options.peers)}


def check(workload: Workload, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """
    Raises:
        SystemExit: a contestant has gone through other samples, or ends elsewhere.
    """
    workload = replace(workload, clients=workload.cohort, batch=workload.samples, epochs=2)
    file = folder / "check.safetensors"
    ours.federation_file(workload, str(file))
    start = {n.removeprefix("trained."): t for n, t in load_file(file).items() if n.startswith("trained.")}
    contestants = field(workload, str(file), 1, CORES, options)
    contestants["loop"] = bare.contestant(workload, str(file), "clients", CORES)
    found, expected = {}, workload.cohort * workload.samples * workload.epochs
    for name, contestant in contestants.items():
        saved = folder / f"{name}.safetensors"
        with contestant:
            contestant.ready()
            samples = contestant.ask(rounds=1, save=str(saved))["samples"]
        tensors = load_file(saved)
        if name == "ours":
            reference, change = tensors, max(float((tensors[n] - start[n]).abs().max()) for n in start)
        difference = max(float((tensors[n] - reference[n]).abs().max()) for n in start) / change
        found[name] = {"samples": samples, "difference": difference}
        if samples != expected or difference > LARGEST_DIFFERENCE or set(tensors) != set(start):
            raise SystemExit(f"{name} does other work: {found[name]}, and {expected} samples expected")
    return found


if __name__ == "__main__":
    main()
