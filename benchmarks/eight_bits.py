"""Frozen weights in 8 bits beside fp32 and bf16: the bytes of all weights, and the time of a local step.

    python benchmarks/eight_bits.py [--model vit_base_patch16_224 --image-size 112 --lanes 4 --batch 8]

All contestants live in one process and take turns, a round of one local step each, so that a change of the machine's
speed meets all of them. `step_ms` is the median of a contestant's turns. The script prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from itertools import product
from typing import Any

from contest import machine
from ours import METHODS
from workloads import common_options

from fedpeft_dist.config.load import parse_config
from fedpeft_dist.federation.simulation import Simulation, build_simulation
from fedpeft_dist.runtime import process


def main() -> None:
    parser = common_options(__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["bias", "lora"], choices=[m for m in METHODS if m != "full"])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--lanes", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    results = {}
    for method in options.methods[:1] if options.tiny else options.methods:
        contestants, times = {}, {}
        for precision, quantize in product(("fp32", "bf16"), ("none", "int8")):
            config = parse_config(make_tree(method, quantize, options), "benchmark")
            with process.start(config.runtime) as runtime:
                simulation = build_simulation(config, replace(runtime, precision=precision))
            contestants[f"{precision}, {quantize}"] = simulation
            step(simulation)  # the first step makes what later ones find
        for _ in range(options.turns):
            for name, simulation in contestants.items():
                times.setdefault(name, []).append(step(simulation))
        results[method] = {
            name: {
                "weights_mib": weights_of(simulation) / 2**20,
                "step_ms": 1000 * statistics.median(times[name]),
                "to_unquantized": statistics.median(
                    own / whole for own, whole in zip(times[name], times[f"{name.partition(',')[0]}, none"])
                ),
            }
            for name, simulation in contestants.items()
        }
    print(json.dumps({"machine": machine(), **vars(options), "methods": results}, indent=1))


def step(simulation: Simulation) -> float:
    """Seconds of a round of one local step on all lanes."""
    state, setup = simulation.initial_state(), simulation.setup
    started = time.perf_counter()
    clients = range(simulation.config.runtime.lanes)
    for update in simulation.trainer.train(setup.tasks(clients), simulation.start(simulation.aggregation(state))):
        update.loss.item()
    return time.perf_counter() - started


def weights_of(simulation: Simulation) -> int:
    """Bytes of the model that trains."""
    model = simulation.setup.model.backbone.model
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def make_tree(method: str, quantize: str, options: argparse.Namespace) -> dict[str, Any]:
    tiny = {"depth": 1, "embed_dim": 32, "num_heads": 2} if options.tiny else {}
    lanes, batch = options.lanes, options.batch
    data = {"name": "synthetic", "image_size": options.image_size, "num_train": lanes * batch, "num_test": 1}
    return {
        "backbone": {"name": options.model, "pretrained": False, "model_args": tiny},
        "method": METHODS[method],
        "data": data | {"clients": lanes, "partition": {"name": "iid"}},
        "federation": {"rounds": 1, "cohort": lanes, "evaluate_every": 0},
        "client": {"epochs": 1, "batch_size": batch},
        "runtime": {"device": options.device, "lanes": lanes, "sharding": {"quantize": quantize}},
    }


if __name__ == "__main__":
    main()
