"""What sharding saves and costs: each rank's memory and the time of a step, for groups of 1, 2 and 4 ranks.

    python benchmarks/sharding.py [--backbone vit_base_patch16_224] [--offload cpu] [--quantize int8] [--tiny]

The script prints one JSON object. Each setting runs in processes of its own, one thread a rank, on random images and
weights. Memory is the most that a rank has had resident: while it loaded the weights, and in training. `before` is what
it had before the backbone was made: Python, the libraries and the images. Ranks without sharding stand beside those
with it, because ranks on one machine share its cores and its memory bus.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fedpeft_dist.config.load import parse_config
from fedpeft_dist.federation.setup import HOST
from fedpeft_dist.federation.simulation import build_simulation
from fedpeft_dist.runtime import process
from fedpeft_dist.runtime.memory import forget_peak_memory, peak_memory, used_memory
from fedpeft_dist.runtime.mesh import spread
from fedpeft_dist.training.trainer import Trainer

SETTINGS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 4)]
"""Ranks, and ranks of a group."""
STEPS, WARM = 6, 2
"""Steps that are timed, after those that warm up."""
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--offload", choices=("none", "cpu"), default="none")
    parser.add_argument("--quantize", choices=("none", "int8"), default="none")
    parser.add_argument("--tiny", action="store_true", help="a small model, two settings")
    parser.add_argument("--rank-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of is not None:
        run_rank(options)
        return
    results = {}
    for ranks, size in SETTINGS[1:3] if options.tiny else SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            own = ["--rank-of", str(size), "--output", folder, *sys.argv[1:]]
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
            subprocess.run([*launcher, __file__, *own], check=True, stdout=subprocess.DEVNULL)
            results[f"{ranks} ranks, size {size}"] = summary(Path(folder))
    given = {key: getattr(options, key) for key in ("backbone", "offload", "quantize")}
    print(json.dumps({**given, "settings": results}, indent=1))


def summary(folder: Path) -> dict[str, Any]:
    """The largest memory and the mean step of the ranks, in MiB and seconds."""
    ranks = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    found = {key: round(max(rank[key] for rank in ranks) / 2**20, 1) for key in ranks[0] if key.endswith("bytes")}
    return found | {"step_seconds": round(statistics.mean(rank["step_seconds"] for rank in ranks), 3)}


def make_tree(options: argparse.Namespace) -> dict[str, Any]:
    arguments, image = (TINY, 16) if options.tiny else ({}, 64)
    is_on = options.rank_of > 1
    return {
        "backbone": {"name": options.backbone, "pretrained": False, "model_args": arguments},
        "method": {"name": "lora"},
        "data": {"name": "synthetic", "image_size": image, "clients": 8, "partition": {"name": "iid"}},
        "federation": {"cohort": 8},
        "client": {"epochs": 1, "batch_size": 4},
        "runtime": {
            "device": "cpu",
            "lanes": 2,
            "products": "torch",
            "sharding": {
                "size": options.rank_of,
                "offload": options.offload if is_on else "none",
                "quantize": options.quantize,
            },
        },
    }


def run_rank(options: argparse.Namespace) -> None:
    config = parse_config(make_tree(options), "benchmark")
    with process.start(config.runtime) as runtime, spread(runtime, config.runtime.sharding) as runtime:
        figures = {"before_bytes": used_memory(HOST)}
        forget_peak_memory(HOST)
        simulation = build_simulation(config, runtime)
        weights = simulation.setup.weights
        parameters = sum(tensor.nbytes for tensor in simulation.setup.model.backbone.model.parameters())
        figures |= {
            "loading_peak_bytes": peak_memory(HOST),
            "own_weight_bytes": parameters if weights is None else parameters + weights.own_bytes,
        }
        forget_peak_memory(HOST)
        figures["step_seconds"] = time_of_a_step(simulation)
        figures["training_peak_bytes"] = peak_memory(HOST)
        (options.output / f"{runtime.rank}.json").write_text(json.dumps(figures))


def time_of_a_step(simulation) -> float:
    """Seconds of a local step on all lanes: the median."""
    moments: list[float] = []
    step = Trainer._local_step

    def timed(*arguments) -> None:
        started = time.perf_counter()
        step(*arguments)
        moments.append(time.perf_counter() - started)

    Trainer._local_step = timed
    setup = simulation.setup
    samples = torch.arange(setup.batch_size)
    clients = range(simulation.trainer.schedule.num_lanes)
    steps = dict.fromkeys(clients, WARM + STEPS)
    tasks = [task for task in setup.tasks(list(clients), steps) if len(task.samples) >= len(samples)]
    start = simulation.start(simulation.aggregation(simulation.initial_state()))
    for _ in simulation.trainer.train(tasks, start):
        pass
    return statistics.median(moments[WARM:])


if __name__ == "__main__":
    main()
