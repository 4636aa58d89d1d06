"""Kills one of four ranks, of which two each share frozen weights, at random moments.

    python -m tests.multiprocess.sharded_kills [--count 10] [--seed 1]

Nobody but the ranks themselves notices, as under srun. The others must end in bounded time and name the lost rank. The
same config, with another number of ranks to a group, then ends as the run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

from tests.real_runs import complete, differences, rounds_logged, run_of, start_warm, write_config

RANKS, SIZE, ROUNDS = 4, 2, 30
OTHERS = [(1, 1), (2, 1), (2, 2), (4, 4)]
"""Ranks, and ranks of a group, that a run goes on with."""
LONGEST = 60
"""Seconds in which all ranks must have ended. A rank that is alone notices another one's death at once; then the first
rank has 5 s to fail by itself, and the next ones, in turn, some more."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        num_equal = run_trials(options.count, options.seed, Path(folder))
    print(f"{num_equal} of {options.count} equal")
    raise SystemExit(num_equal != options.count)


def run_trials(count: int, seed: int, folder: Path, rounds: int = ROUNDS) -> int:
    """Returns how many trials ended as the run that nobody disturbed; prints a line on each."""
    rng, num_equal = random.Random(seed), 0
    whole = write_config(folder, "whole", rounds)
    complete(whole)
    undisturbed = write_config(folder, "undisturbed", rounds, sharding=SIZE)
    started = time.monotonic()
    complete(undisturbed, RANKS)
    duration = time.monotonic() - started
    found = differences(run_of(undisturbed), run_of(whole))
    assert not found, found
    for number in range(count):
        config = write_config(folder, f"trial-{number}", rounds, sharding=SIZE)
        told, found = kill_one(config, rng, duration * (0.15 + 0.8 * (number + rng.random()) / count))
        ranks, size = OTHERS[number % len(OTHERS)]
        write_config(folder, f"trial-{number}", rounds, sharding=size)
        complete(config, ranks)
        found += differences(run_of(config), run_of(whole))
        print(f"{number + 1:>3}: {told}; on {ranks} ranks, {size} a group: {'; '.join(found) or 'equal'}", flush=True)
        num_equal += not found
    return num_equal


def kill_one(config: Path, rng: random.Random, moment: float) -> tuple[str, list[str]]:
    """Kills a rank at a moment, in seconds after the start; returns what happened, and what went wrong."""
    with start_warm(config, RANKS) as warm:
        time.sleep(moment)
        lost, rounds = rng.randrange(RANKS), rounds_logged(run_of(config))
        if not warm.is_running:
            return f"ended before {moment:.1f} s", []
        warm.ranks[lost].kill()
        killed, others = time.monotonic(), [rank for number, rank in enumerate(warm.ranks) if number != lost]
        codes = [rank.wait(max(0.0, killed + LONGEST - time.monotonic())) for rank in others]
        seconds, output = time.monotonic() - killed, "".join(rank.output for rank in others)
    found = [] if None not in codes else [f"ranks still run after {LONGEST} s"]
    found += [] if 0 not in codes else [f"ranks end with codes {codes}"]
    if f"rank {lost} " not in output:
        found.append(f"the output does not name rank {lost}: {output[-400:]!r}")
    return f"killed rank {lost} after {moment:.1f} s and {rounds} rounds, all ended in {seconds:.1f} s", found


if __name__ == "__main__":
    main()
