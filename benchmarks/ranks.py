"""What a second rank gives: samples per second of one and of two ranks with one thread each, and of two threads.

    python benchmarks/ranks.py [--workloads overhead glyph] [--turns 5]

The script prints one JSON object. A ratio is the median over the turns of the speed over that of one rank with one
thread, so 2 would be a perfect second core. The ranks' all-reduce is part of a turn.
"""

from __future__ import annotations

import json

import ours
from contest import machine, race, ratio
from workloads import chosen, common_options

SETTINGS = {"1 rank x 1 thread": (1, 1), "1 rank x 2 threads": (1, 2), "2 ranks x 1 thread": (2, 1)}


def main() -> None:
    options = common_options(__doc__.splitlines()[0], ["overhead", "glyph"]).parse_args()
    results = {}
    for name in options.workloads:
        contestants = {what: ours.contestant(chosen(name, options), *own) for what, own in SETTINGS.items()}
        found = race(contestants, options.turns, options.seconds)
        results[name] = {"ratios": {n: ratio(found, n, next(iter(SETTINGS))) for n in found}, "settings": found}
    print(json.dumps({"machine": machine(), "turns": options.turns, "workloads": results}, indent=1))


if __name__ == "__main__":
    main()
