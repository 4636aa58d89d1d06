"""Kills runs with SIGKILL at random moments and checks that each ends as the run that nobody disturbed.

    python -m tests.multiprocess.random_kills --mode rank|all|restart [--count 30] [--seed 1]

`rank` kills one of two ranks and leaves the rest to torchrun's restart, `all` kills torchrun and its ranks and runs the
same command again, `restart` does that several times, also while the run is being resumed, on one rank or on two.
Moments lie between the start of the first process (of the ranks, where one of them is to be killed) and the end of the
last.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from fedpeft_dist.tracking.run_directory import RunDirectory
from tests.real_runs import (
    Launched,
    complete,
    differences,
    rounds_logged,
    run_of,
    send,
    start,
    wait_until,
    write_config,
)

ROUNDS = 120
"""About half of the time passes before the first."""
MODES = ("rank", "all", "restart")
MAX_RESTARTS = 3
"""One for the rank that is killed; more would be a mistake that must not pass for a failure of the test's own."""
MAX_KILLS = 3
"""Of one trial that is killed again and again."""
RESUMED = 0.7
"""A resumed run has less to do: of the whole run's time, this part is where it is killed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        num_equal = run_trials(options.mode, options.count, options.seed, Path(folder))
    print(f"{num_equal} of {options.count} equal")
    raise SystemExit(num_equal != options.count)


def run_trials(mode: str, count: int, seed: int, folder: Path, rounds: int = ROUNDS) -> int:
    """Returns how many trials ended as the run that nobody disturbed; prints a line on each.

    Every trial has a part of the run's duration to itself, so that a few of them, too, cover start, rounds and end.
    """
    trials = Trials(mode, random.Random(seed), folder, rounds)
    num_equal = 0
    for number in range(count):
        started = time.monotonic()
        found = trials.run(number, count)
        seconds, kills, every = time.monotonic() - started, "; ".join(trials.kills), trials.every(number)
        told = "equal" if not found else "NOT EQUAL\n  " + "\n  ".join(found)
        print(f"{number + 1:>3}: {seconds:.0f} s, checkpoint every {every}, killed {kills}: {told}", flush=True)
        num_equal += not found
    return num_equal


@dataclass
class Trials:
    mode: str
    rng: random.Random
    folder: Path
    rounds: int
    kills: list[str] = field(init=False, default_factory=list)
    """Of the last trial, in words."""

    def __post_init__(self) -> None:
        config = write_config(self.folder, "whole", self.rounds)
        with start(config, ranks=2) as launched:
            self.until_ranks = wait_for_ranks(launched)
            assert launched.wait() == 0, launched.output
            self.duration, self.whole = launched.seconds, run_of(config)

    @staticmethod
    def every(number: int) -> int:
        """Rounds between checkpoints."""
        return 1 + 2 * (number % 2)

    def run(self, number: int, count: int) -> list[str]:
        """A trial: its differences from the whole run."""
        config = write_config(self.folder, f"trial-{number}", self.rounds, checkpoint_every=self.every(number))
        run, disturb = run_of(config), self._kill_a_rank if self.mode == "rank" else self._kill_everything
        self.kills, output = [], ""
        while not self.kills:  # a run that has ended before its moment is no trial
            shutil.rmtree(run.path, ignore_errors=True)
            try:
                output = disturb(config, run, (number + self.rng.random()) / count)
            except (subprocess.TimeoutExpired, AssertionError) as error:
                return [f"the command does not end as it should: {error}"]
        found = differences(run, self.whole)
        return [*found, *output.splitlines()[-30:]] if found else []

    def _kill_a_rank(self, config: Path, run: RunDirectory, part: float) -> str:
        """Kills one after this part of the time that the ranks take; returns what was printed."""
        with start(config, ranks=2, max_restarts=MAX_RESTARTS) as launched:
            moment = wait_for_ranks(launched) + part * (self.duration - self.until_ranks)
            sleep_until(moment, launched)
            rank, now = self.rng.randrange(2), moment_in_words(launched, run)
            pid = launched.ranks().get(rank)
            if pid is not None and send(pid, signal.SIGKILL):
                self.kills.append(f"rank {rank} {now}")
            assert launched.wait() == 0, launched.output
            self._note_duration(launched)
            return launched.output

    def _kill_everything(self, config: Path, run: RunDirectory, part: float) -> str:
        """Once or several times, then lets it end; returns what the last command printed."""
        several = self.mode == "restart"
        for attempt in range(MAX_KILLS if several else 1):
            ranks = self.rng.choice((1, 2)) if several else 2
            with start(config, ranks) as launched:
                sleep_until(self.duration * (RESUMED * self.rng.random() if attempt else part), launched)
                now = moment_in_words(launched, run)
                if launched.process.poll() is not None:
                    self._note_duration(launched)
                    break
            self.kills.append(f"{ranks} rank{'s' * (ranks > 1)} {now}")
        return complete(config, self.rng.choice((1, 2)) if several else 2) if self.kills else ""

    def _note_duration(self, launched: Launched) -> None:
        """The machine may be faster now than it was for the whole run."""
        if not self.kills:
            self.duration = min(self.duration, launched.seconds)


def wait_for_ranks(launched: Launched) -> float:
    """The seconds from the start until both ranks are there."""
    wait_until(lambda: len(launched.ranks()) == 2)
    return launched.seconds


def sleep_until(moment: float, launched: Launched) -> None:
    while launched.seconds < moment and launched.process.poll() is None:
        time.sleep(0.005)


def moment_in_words(launched: Launched, run: RunDirectory) -> str:
    rounds = rounds_logged(run)
    return f"after {launched.seconds:.2f} s, {f'{rounds} rounds logged' if rounds else 'before the first round'}"


if __name__ == "__main__":
    main()
