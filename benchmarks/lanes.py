"""How the speed grows with the lanes of a rank: samples per second of 1 to 16 lanes, in turns.

    python benchmarks/lanes.py [--workloads overhead glyph] [--lanes 1 2 4 8 16] [--turns 5]

One rank takes all cores as threads; the cohort is 16 clients. The script prints one JSON object. A ratio is the median
over the turns of the speed over that of the first number of lanes.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace

import ours
from contest import machine, race, ratio
from workloads import chosen, common_options

CORES = len(os.sched_getaffinity(0))


def main() -> None:
    parser = common_options(__doc__.splitlines()[0], ["overhead", "glyph"])
    parser.add_argument("--lanes", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    options = parser.parse_args()
    results = {}
    for name in options.workloads:
        workload = chosen(name, options)
        workload = replace(workload, cohort=min(workload.clients, max(options.lanes)))
        contestants = {str(lanes): ours.contestant(workload, 1, CORES, lanes=lanes) for lanes in options.lanes}
        found = race(contestants, options.turns, options.seconds)
        first = str(options.lanes[0])
        results[name] = {"ratios": {n: ratio(found, n, first) for n in contestants}, "lanes": found}
    print(json.dumps({"machine": machine(), "turns": options.turns, "workloads": results}, indent=1))


if __name__ == "__main__":
    main()
