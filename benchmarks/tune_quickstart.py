"""Chooses the quickstart's learning rates: the same grid for every method, judged on held-out training samples.

    python benchmarks/tune_quickstart.py [method ...]

A fifth of every client's samples is held out. The test images are never looked at. The script prints one JSON object a
method. It holds the best rate and, for each rate, the validation accuracy of the global model after the last round, the
mean over the seeds.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path

from fedpeft_dist.config.load import load_config
from fedpeft_dist.config.schema import RuntimeConfig
from fedpeft_dist.federation.run import run
from fedpeft_dist.runtime import process
from fedpeft_dist.tracking.run_directory import RunDirectory, read_json

CONFIGS = Path(__file__).parent.parent / "configs" / "quickstart"
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
SEEDS = (11, 12)
METHODS = ("head", "bias", "norm", "prompt", "adapter", "lora", "full", "scratch")
METHODS += ("partial", "adaptformer", "houlsby", "repadapter", "diffit", "convpass", "prefix")
METHODS += ("ssf", "ia3", "dora", "vera", "fact_tt", "fact_tk")


def main() -> None:
    with process.start(RuntimeConfig(device="cpu")) as runtime, tempfile.TemporaryDirectory() as root:
        for method in sys.argv[1:] or METHODS:
            accuracies = {rate: mean_accuracy(method, rate, Path(root), runtime) for rate in RATES}
            best = max(accuracies, key=accuracies.get)
            print(json.dumps({"method": method, "best_rate": best, "accuracy_by_rate": accuracies}), flush=True)


def mean_accuracy(method: str, rate: float, root: Path, runtime: process.Runtime) -> float:
    accuracies = []
    for seed in SEEDS:
        name = f"{method}-{rate}-{seed}"
        overrides = [
            f"seed={seed}",
            f"client.optimizer.lr={rate}",
            "data.validation=0.2",
            "federation.evaluate_on=validation",
            "federation.evaluate_every=0",
            "runtime.precision=fp32",
            "runtime.lanes=2",
            f"output.root={root}",
            f"output.name={name}",
            "output.checkpoint_every=0",
        ]
        run(load_config(CONFIGS / f"{method}.yaml", overrides), runtime=runtime)
        accuracies.append(read_json(RunDirectory(root / name).summary_file)["final_accuracy"])
    return statistics.mean(accuracies)


if __name__ == "__main__":
    main()
