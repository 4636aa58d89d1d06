"""Compares FedAvg with robust means while one of eight clients sends its delta times -10.

    python benchmarks/robust_mean.py [--rounds 20] [key=value ...]

The federation is the quickstart's bias-tuning, with all of eight clients in every round. Prints one JSON object: each
algorithm's final accuracy with an honest cohort and with the attacker.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fedpeft_dist.config.load import load_config
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.federation.round import run_round
from fedpeft_dist.federation.simulation import build_simulation
from fedpeft_dist.federation.watch import Watch
from fedpeft_dist.runtime import process
from fedpeft_dist.runtime.interrupts import StopRequest
from fedpeft_dist.training.trainer import ClientUpdate, Trainer

CONFIG = "configs/quickstart/bias.yaml"
ALGORITHMS = {
    "fedavg": "{name: fedavg}",
    "trimmed_mean": "{name: trimmed_mean, trim: 0.125}",
    "median": "{name: median}",
}
CLIENTS, ATTACKER, FACTOR = 8, 3, -10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("overrides", nargs="*", help="keys of the config, such as data.partition.alpha=0.1")
    options = parser.parse_args()
    shared = [f"data.clients={CLIENTS}", f"federation.cohort={CLIENTS}", f"federation.rounds={options.rounds}"]
    accuracies = {}
    for name, algorithm in ALGORITHMS.items():
        config = load_config(CONFIG, [*shared, f"algorithm={algorithm}", *options.overrides])
        accuracies[name] = {"honest": accuracy(config, False), "attacked": accuracy(config, True)}
    print(json.dumps({"rounds": options.rounds, "clients": CLIENTS, "factor": FACTOR, "accuracy": accuracies}))


def accuracy(config: RunConfig, is_attacked: bool) -> float:
    """The final accuracy of a run, with or without the attacker."""
    with process.start(config.runtime) as runtime:
        simulation = build_simulation(config, runtime)
        if is_attacked:
            simulation.trainer = AttackedTrainer(simulation.trainer)
        state, watch = simulation.initial_state(), Watch(StopRequest())
        while state.round < simulation.num_rounds:
            state = run_round(state, simulation, watch).state
        return state.totals["final_accuracy"]


class AttackedTrainer:
    """A trainer whose client ATTACKER sends its delta times FACTOR."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def train(self, *arguments: Any) -> Iterator[ClientUpdate]:
        for update in self.trainer.train(*arguments):
            yield replace(update, delta=FACTOR * update.delta) if update.client == ATTACKER else update


if __name__ == "__main__":
    main()
