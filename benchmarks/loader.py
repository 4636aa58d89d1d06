"""Measures whether images keep up with training: the store's speed beside a trainer's need, its building, its memory.

    python benchmarks/loader.py [batches]

The script prints one JSON object. All figures come from one run on one machine, with OMP_NUM_THREADS threads. The data
is a CIFAR-100 of random pixels, 50,000 + 10,000 images, written to a temporary folder in its original format.
"""

from __future__ import annotations

import json
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from fedpeft_dist.config.load import parse_config
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.data import load_dataset
from fedpeft_dist.data.store import DeviceStore
from fedpeft_dist.federation.setup import Setup
from fedpeft_dist.federation.simulation import Simulation, build_simulation
from fedpeft_dist.runtime import process
from fedpeft_dist.training.trainer import RoundStart

LANES, BATCH, STEPS = 4, 64, 40
NUM_TRAIN, NUM_TEST = 50_000, 10_000


def main() -> None:
    num_batches = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as folder:
        write_cifar100(Path(folder))
        config = make_config(folder, "crop_flip")
        seconds, _ = timed(lambda: load_dataset(config.data, 1))
        opened, _ = timed(lambda: load_dataset(config.data, 1))
        with process.start(config.runtime) as runtime:
            rates = measure_rates(build_simulation(config, runtime))
            resized = Setup(make_config(folder, "resized_crop_flip"), runtime).train_store
            rates["resized_crop_flip"] = store_rate(resized)
            memory = measure_memory(Setup(config, runtime).train_store, num_batches)
    result = {
        "store_over_training": rates["crop_flip"] / rates["training"],
        "images_per_second": rates,
        "build_seconds": seconds,
        "open_seconds": opened,
        "memory": memory,
        "threads": config.runtime.threads,
    }
    print(json.dumps(result, indent=1))


def write_cifar100(root: Path) -> None:
    folder, rng = root / "cifar-100-python", np.random.default_rng(0)
    folder.mkdir()
    for name, size in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        pixels = rng.integers(0, 256, (size, 3072), dtype=np.uint8)
        content = {b"data": pixels, b"fine_labels": (np.arange(size) % 100).tolist()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    names = {b"fine_label_names": [b"class%d" % k for k in range(100)]}
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=2))


def make_config(root: str, augment: str) -> RunConfig:
    """The least work in the quickstart: training the head of glyph_vit. Random weights take as long as trained ones."""
    data = {"name": "cifar100", "root": root, "image_size": 32, "augment": augment, "clients": 8}
    tree = {
        "backbone": {"name": "glyph_vit", "pretrained": False, "model_args": {"in_chans": 3}},
        "method": {"name": "head"},
        "data": data | {"partition": {"name": "iid"}},
        "federation": {"cohort": LANES},
        "client": {"steps": STEPS, "batch_size": BATCH},
        "runtime": {"device": "cpu", "lanes": LANES, "cache": "none"},
    }
    return parse_config(tree, "benchmark")


def timed(function: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def random_batches(store: DeviceStore, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Sample numbers and keys, [L, B] each."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        indices = torch.randint(0, len(store), (LANES, BATCH), generator=generator)
        yield indices, torch.randint(-(2**62), 2**62, (LANES, BATCH), generator=generator)


def store_rate(store: DeviceStore) -> float:
    """Images per second, gathered, augmented and normalised: the median of single batches."""
    batches = random_batches(store, 110)
    seconds = [timed(lambda: store.batch(*next(batches)))[0] for _ in range(110)]
    return LANES * BATCH / statistics.median(seconds[10:])


def measure_rates(simulation: Simulation) -> dict[str, float]:
    """Images per second that the store makes, and those that a round of clients consumes, the store's time left out."""
    setup, trainer, store = simulation.setup, simulation.trainer, simulation.setup.train_store
    store.transform, transform = (lambda images, keys: images), store.transform
    plain = store_rate(store)
    store.transform = transform
    making = store_rate(store)
    [(images, labels)] = [store.batch(*pair) for pair in random_batches(store, 1)]
    store.batch = lambda indices, keys: (images, labels)
    tasks, start = setup.tasks(range(LANES)), RoundStart(0, setup.initial_vector)
    rounds = [timed(lambda: list(trainer.train(tasks, start)))[0] for _ in range(4)]
    return {"none": plain, "crop_flip": making, "training": LANES * BATCH * STEPS / statistics.median(rounds[1:])}


def measure_memory(store: DeviceStore, num_batches: int) -> dict[str, float]:
    """Resident MiB while batches are made: anonymous memory is the process's own, file memory the shared page cache."""
    readings = []
    for number, (indices, keys) in enumerate(random_batches(store, num_batches)):
        store.batch(indices, keys)
        if number in (num_batches // 10, num_batches - 1):
            readings.append(resident_mib())
    first, last = readings
    return {
        "batches": num_batches,
        "own_mib_after_a_tenth": first["RssAnon"],
        "own_mib_at_the_end": last["RssAnon"],
        "own_growth_mib": last["RssAnon"] - first["RssAnon"],
        "page_cache_mib_at_the_end": last["RssFile"],
    }


def resident_mib() -> dict[str, float]:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {key: int(fields[key].split()[0]) / 1024 for key in ("RssAnon", "RssFile")}


if __name__ == "__main__":
    main()
