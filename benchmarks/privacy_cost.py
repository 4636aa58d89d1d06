"""The cost of sample-level privacy: its samples per second beside training without, in one process, in turns.

    python benchmarks/privacy_cost.py [--methods bias lora ...] [--turns N]

The model is a ViT of width 128 and depth 6, on 32 pixels in patches of 8. There are 64 clients of 64 samples, a cohort
of 8, batches of 16 and two epochs. A turn trains one private and one plain round. The samples counted are those that
the round goes through; under a Poisson draw their number varies.

The script prints one JSON object a method. `ratio` is private / plain, the median over the turns.
`memory_over_gradients` is the peak memory of a private round, matrices and activations included. Its unit is the size
of the per-sample gradients, L * B * P float32 numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fedpeft_dist.checkpoint import Noise
from fedpeft_dist.config.load import parse_config
from fedpeft_dist.federation.simulation import build_simulation
from fedpeft_dist.runtime import process
from fedpeft_dist.runtime.memory import forget_peak_memory, peak_memory, used_memory
from fedpeft_dist.training.trainer import RoundStart

METHODS = {
    "head": {"name": "head"},
    "bias": {"name": "bias"},
    "prompt": {"name": "prompt"},
    "lora": {"name": "lora"},
    "adapter": {"name": "adapter", "bottleneck": 16},
    "full": {"name": "full"},
}
CLIENTS, SAMPLES, COHORT, BATCH, EPOCHS = 64, 64, 8, 16, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["bias", "lora", "adapter"], choices=METHODS)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--backbone", default="vit_tiny_patch16_224", help="a timm model; the default is made small")
    parser.add_argument("--image-size", type=int, default=32)
    options = parser.parse_args()
    for method in options.methods:
        print(json.dumps({"method": method, **measure(method, options)}), flush=True)


def measure(method: str, options: argparse.Namespace) -> dict[str, Any]:
    with process.start(make_config(method, options, {"name": "none"}).runtime) as runtime:
        private, size = make_round(make_config(method, options, {"name": "sample", "noise_multiplier": 1.0}), runtime)
        plain, _ = make_round(make_config(method, options, {"name": "none"}), runtime)
        memory = memory_of(private, runtime)  # the first round makes the matrices
        plain_memory = memory_of(plain, runtime)
        turns = [(speed(private, turn, runtime), speed(plain, turn, runtime)) for turn in range(options.turns)]
    return {
        "ratio": statistics.median(ours / theirs for ours, theirs in turns),
        "private_samples_per_second": statistics.median(ours for ours, _ in turns),
        "plain_samples_per_second": statistics.median(theirs for _, theirs in turns),
        "parameters": size,
        "memory_bytes": memory,
        "plain_memory_bytes": plain_memory,
        "memory_over_gradients": memory / (4 * COHORT * BATCH * size),
        "device": runtime.device.type,
        "precision": runtime.precision,
        "turns": options.turns,
    }


def make_config(method: str, options: argparse.Namespace, privacy: dict[str, Any]):
    tree = {
        "backbone": {"name": options.backbone, "pretrained": False},
        "method": METHODS[method],
        "data": {
            "name": "synthetic",
            "image_size": options.image_size,
            "num_train": CLIENTS * SAMPLES,
            "num_test": 1,
            "clients": CLIENTS,
            "partition": {"name": "iid"},
        },
        "federation": {"cohort": COHORT, "rounds": 1},
        "client": {"epochs": EPOCHS, "batch_size": BATCH},
        "privacy": privacy,
        "runtime": {"lanes": COHORT},
    }
    if options.backbone == "vit_tiny_patch16_224":
        tree["backbone"]["model_args"] = {"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}
    return parse_config(tree, "benchmark")


def make_round(config, runtime: process.Runtime) -> tuple[Callable[[int], int], int]:
    """A function that trains the round of a given number and returns the samples gone through; and P."""
    everyone = Noise(torch.ones(CLIENTS, dtype=torch.float64), seed=1)  # also clients that no round schedules
    simulation = build_simulation(config, runtime, None if config.privacy.name == "none" else everyone)
    tasks, vector = simulation.setup.tasks(range(COHORT)), simulation.setup.initial_vector

    def run(number: int) -> int:
        return sum(update.num_samples for update in simulation.trainer.train(tasks, RoundStart(number, vector)))

    return run, len(vector)


def speed(run: Callable[[int], int], number: int, runtime: process.Runtime) -> float:
    """Samples per second."""
    started = time.perf_counter()
    samples = run(number)
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()
    return samples / (time.perf_counter() - started)


def memory_of(run: Callable[[int], int], runtime: process.Runtime) -> int:
    """The peak bytes of a round, beyond the memory in use before it."""
    before = used_memory(runtime.device)
    forget_peak_memory(runtime.device)
    run(0)
    return peak_memory(runtime.device) - before


if __name__ == "__main__":
    main()
