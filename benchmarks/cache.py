"""What the cache of the frozen prefix gives: samples per second with `runtime.cache` auto and none, in turns.

    python benchmarks/cache.py [--workloads head partial] [--turns 5]

The cache is filled before the first turn. The script prints one JSON object. The ratio is the median over the turns.
"""

from __future__ import annotations

import json
import os

import ours
from contest import machine, race, ratio
from workloads import chosen, common_options

CORES = len(os.sched_getaffinity(0))


def main() -> None:
    options = common_options(__doc__.splitlines()[0], ["head", "partial"]).parse_args()
    if not ours.known({"cache": "none"}):
        raise SystemExit("error: this version has no key runtime.cache")
    results = {}
    for name in options.workloads:
        contestants = {c: ours.contestant(chosen(name, options), 1, CORES, cache=c) for c in ("auto", "none")}
        found = race(contestants, options.turns, options.seconds)
        results[name] = {"ratio": ratio(found, "auto", "none"), "caches": found}
    print(json.dumps({"machine": machine(), "turns": options.turns, "workloads": results}, indent=1))


if __name__ == "__main__":
    main()
