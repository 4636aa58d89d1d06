"""A contestant: the same federation in Flower's simulation runtime (PyPI `flwr[simulation]`), in one process tree.

Flower runs its clients in Ray's workers; `processes` says how many. Only the trained tensors are sent, and no client
evaluates. Its argument is that of benchmarks/bare.py with `processes` and `threads` in place of `kind`.
"""

from __future__ import annotations

import json
import os
import sys

os.environ.update(FLWR_TELEMETRY_ENABLED="0", RAY_USAGE_STATS_ENABLED="0")

from bare import Federation
from contest import claim_output, serve
from flower_client import app
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from safetensors.torch import save_file
from workloads import Workload


def main() -> None:
    answers, argument = claim_output(), json.loads(sys.argv[1])
    workload, server = Workload(**argument["workload"]), ServerApp()

    @server.main()
    def serve_turns(grid: Grid, context: Context) -> None:
        rounds = Rounds(workload, argument, grid)
        serve(answers, rounds.run, rounds.save)

    run_simulation(
        server_app=server,
        client_app=app,
        num_supernodes=workload.clients,
        backend_config={
            "init_args": {"num_cpus": argument["processes"], "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )


class Rounds:
    """A federation that goes on from round to round."""

    def __init__(self, workload: Workload, argument: dict, grid: Grid):
        self.workload, self.grid = workload, grid
        self.arrays = ArrayRecord(Federation(workload, argument["file"]).tensors())
        keys = {"workload": json.dumps(argument["workload"]), "file": argument["file"], "threads": argument["threads"]}
        self.config = ConfigRecord(keys)
        self.strategy = FedAvg(
            fraction_train=workload.cohort / workload.clients,
            fraction_evaluate=0.0,
            min_train_nodes=workload.cohort,
            min_available_nodes=workload.clients,
        )

    def run(self, number: int) -> int:
        result = self.strategy.start(self.grid, self.arrays, num_rounds=number, train_config=self.config)
        self.arrays = result.arrays
        means = [metrics["seen"] for metrics in result.train_metrics_clientapp.values()]
        return round(sum(means) * self.workload.cohort)

    def save(self, path: str) -> None:
        save_file(self.arrays.to_torch_state_dict(), path)


if __name__ == "__main__":
    main()
