"""What a round costs beside local training, and what a run costs beside its rounds.

    python benchmarks/round_overhead.py [--workloads overhead glyph head] [--turns 9]

A round is the plan, local training, the sums over clients and ranks, and the step. The clock stops while the trainer
works; the rest is `seconds_beside_training`. A run is the whole command `fedpeft train` with two rounds, so
`seconds_beside_rounds` holds the imports, the model, the data, checkpoints and one evaluation.

The script prints one JSON object. Seconds are medians over the turns, in one process with one thread.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from contest import PACKAGE, machine
from ours import Rounds
from workloads import Workload, chosen, common_options

from fedpeft_dist.config.load import parse_config
from fedpeft_dist.runtime import process
from fedpeft_dist.training.trainer import ClientUpdate, Trainer


def main() -> None:
    options = common_options(__doc__.splitlines()[0], ["overhead", "glyph", "head"]).parse_args()
    results = {name: measure(chosen(name, options), options.turns) for name in options.workloads}
    run = measure_run(chosen("overhead", options))
    print(json.dumps({"machine": machine(), "turns": options.turns, "rounds": results, "run": run}, indent=1))


class TimedTrainer:
    """A trainer that tells how long it has worked."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.seconds = trainer, 0.0

    def train(self, *arguments: Any) -> Iterator[ClientUpdate]:
        updates = self.trainer.train(*arguments)
        while True:
            started = time.perf_counter()
            update = next(updates, None)
            self.seconds += time.perf_counter() - started
            if update is None:
                return
            yield update

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trainer, name)


def measure(workload: Workload, turns: int) -> dict[str, float]:
    config = parse_config(workload.tree(), "benchmark")
    with process.start(config.runtime) as runtime:
        rounds = Rounds(config, runtime)
        trainer = rounds.simulation.trainer = TimedTrainer(rounds.simulation.trainer)
        rounds.run(2)
        whole, beside = [], []
        for _ in range(turns):
            trainer.seconds, started = 0.0, time.perf_counter()
            rounds.run(1)
            whole.append(time.perf_counter() - started)
            beside.append(whole[-1] - trainer.seconds)
    return {
        "seconds_per_round": statistics.median(whole),
        "seconds_beside_training": statistics.median(beside),
        "share_beside_training": statistics.median(b / w for b, w in zip(beside, whole)),
        "seconds_beside_training_per_client": statistics.median(beside) / workload.cohort,
    }


def measure_run(workload: Workload) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as root:
        tree = workload.tree() | {"output": {"root": root, "name": "run"}}
        tree["federation"]["rounds"] = 2
        file = Path(root) / "run.yaml"
        file.write_text(yaml.safe_dump(tree))
        paths = os.pathsep.join([PACKAGE, *filter(None, [os.environ.get("PYTHONPATH")])])
        command, started = [sys.executable, "-m", "fedpeft_dist", "train", str(file)], time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": paths})
        whole = time.perf_counter() - started
        rows = [json.loads(line) for line in (Path(root) / "run" / "metrics.jsonl").read_text().splitlines()]
    rounds = sum(row["seconds"] for row in rows)
    return {"seconds": whole, "seconds_in_rounds": rounds, "seconds_beside_rounds": whole - rounds}


if __name__ == "__main__":
    main()
