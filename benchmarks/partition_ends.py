"""Compares the first and the last client with the others, in classes and samples, for every partition with a draw.

    python benchmarks/partition_ends.py [--seeds 20]

Two data sets are dealt out to 64 clients with alpha 0.1. One has the sizes of CIFAR-100 (100 classes of 500); the other
is glyphs100 as in configs/offline/glyphs100/base.yaml. If no client is preferred, the three columns differ by chance
alone.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from fedpeft_dist.config.load import load_config, parse_config
from fedpeft_dist.config.schema import DataConfig
from fedpeft_dist.data import load_dataset
from fedpeft_dist.data.datasets import ImageSet
from fedpeft_dist.data.partition import class_counts, make_partition
from fedpeft_dist.lanes.random import derive_seed

CLIENTS, ALPHA = 64, 0.1
GLYPHS = "configs/offline/glyphs100/base.yaml"
PARTITIONS = (
    {"name": "dirichlet", "alpha": ALPHA, "min_samples": 1, "top_up": True},
    {"name": "dirichlet_mix", "alpha": ALPHA},
    {"name": "quantity", "alpha": ALPHA, "min_samples": 0},
    {"name": "iid"},
)


def cifar100_sizes() -> ImageSet:
    labels = torch.arange(100).repeat_interleave(500)
    return ImageSet(torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8), labels)


def glyphs100() -> ImageSet:
    config = load_config(GLYPHS)
    return load_dataset(config.data, derive_seed(config.seed, "data")).train


def section(partition: dict) -> DataConfig:
    data = {"name": "synthetic", "clients": CLIENTS, "partition": partition}
    return parse_config({"data": data, "method": {"name": "head"}}, "benchmark").data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=20)
    seeds = parser.parse_args().seeds
    print(f"means over {seeds} seeds, with their standard errors; others: the mean of all clients between")
    print(f"{'data':<10} {'partition':<14} {'of a client':<12} {'first':>16} {'others':>16} {'last':>16}")
    for name, train in (("cifar100", cifar100_sizes()), ("glyphs100", glyphs100())):
        classes = int(train.labels.max()) + 1
        for partition in PARTITIONS:
            config = section(partition)
            counts = np.stack(
                [class_counts(make_partition(config, train, seed), train.labels, classes, CLIENTS)
                 for seed in range(seeds)]
            )  # fmt: skip
            for what, values in (("classes", (counts > 0).sum(axis=2)), ("samples", counts.sum(axis=2))):
                columns = (values[:, 0], values[:, 1:-1].mean(axis=1), values[:, -1])
                told = (f"{column.mean():.1f} ± {column.std() / seeds**0.5:.1f}" for column in columns)
                print(f"{name:<10} {partition['name']:<14} {what:<12}", *(f"{text:>16}" for text in told))


if __name__ == "__main__":
    main()
