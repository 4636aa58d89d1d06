"""Measures samples per second of the lanes and of a bare PyTorch loop over the same batch, in turns in one process.

    python benchmarks/lanes_against_loop.py [--backbone NAME] [--image-size N] [--lanes L] [--batch B] [--method M]

The loop is the usual loop for one model: L * B images, the same parameters trained in place, torch.optim.SGD, autocast.
The lanes train L clients of B images. Each client has its own parameters, momentum and gradients, and refills are
included. The script prints one JSON object. `ratio` is lanes / loop, the median over the turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from fedpeft_dist.backbones.timm_backbone import build_backbone, classifier_names, freeze
from fedpeft_dist.config.load import parse_config
from fedpeft_dist.federation.simulation import build_simulation
from fedpeft_dist.runtime import process
from fedpeft_dist.training.trainer import RoundStart

TINY = {"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}


def main() -> None:
    options = parse_options()
    config = make_config(options)
    with process.start(config.runtime) as runtime:
        lanes = lanes_round(config, runtime)
        loop = bare_loop(config, runtime)
        lanes(), loop()
        turns = [(timed(lanes, runtime), timed(loop, runtime)) for _ in range(options.turns)]
    samples = options.lanes * options.batch * options.steps
    print(
        json.dumps(
            {
                "ratio": statistics.median(loop_time / lanes_time for lanes_time, loop_time in turns),
                "lanes_samples_per_second": samples / statistics.median(t for t, _ in turns),
                "loop_samples_per_second": samples / statistics.median(t for _, t in turns),
                "device": torch.cuda.get_device_name() if runtime.device.type == "cuda" else "cpu",
                "precision": runtime.precision,
                **vars(options),
            }
        )
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="vit_tiny_patch16_224", help="a timm model; the default is made tiny")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--method", default="bias", choices=["head", "bias", "norm", "full"])
    parser.add_argument("--lanes", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def make_config(options: argparse.Namespace):
    clients, samples = options.lanes, options.batch * options.steps
    tree = {
        "backbone": {"name": options.backbone, "pretrained": False},
        "method": {"name": options.method},
        "data": {
            "name": "synthetic",
            "image_size": options.image_size,
            "num_train": min(clients * samples, 4096),
            "num_test": 1,
            "clients": clients,
            "partition": {"name": "pool", "samples": samples},
        },
        "federation": {"cohort": clients},
        "client": {"epochs": 1, "batch_size": options.batch},
        "runtime": {"lanes": options.lanes, "threads": options.threads},
    }
    if options.backbone == "vit_tiny_patch16_224":
        tree["backbone"]["model_args"] = TINY
    return parse_config(tree, "benchmark")


def lanes_round(config, runtime: process.Runtime) -> Callable[[], None]:
    simulation = build_simulation(config, runtime)
    tasks = simulation.setup.tasks(range(config.federation.cohort))
    start = RoundStart(0, simulation.setup.initial_vector)

    def run() -> None:
        for _ in simulation.trainer.train(tasks, start):
            pass

    return run


def bare_loop(config, runtime: process.Runtime) -> Callable[[], None]:
    backbone = build_backbone(config.backbone, config.data.classes, config.data.image_size, seed=0)
    model = backbone.model
    freeze(model, runtime.compute_dtype if config.method.name != "full" else torch.float32, runtime.device)
    trained = [parameter.requires_grad_() for parameter in trained_parameters(model, config.method.name)]
    sgd = config.client.optimizer
    optimizer = torch.optim.SGD(trained, sgd.lr, sgd.momentum, weight_decay=sgd.weight_decay, nesterov=sgd.nesterov)
    batch = config.client.batch_size * config.federation.cohort
    shape = (batch, config.data.channels, config.data.image_size, config.data.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=runtime.device)
    labels = torch.randint(0, config.data.classes, (batch,), device=runtime.device)
    mean, std = (torch.tensor(v, device=runtime.device).view(-1, 1, 1) for v in (backbone.mean, backbone.std))
    steps = config.data.partition.samples // config.client.batch_size

    def run() -> None:
        torch.use_deterministic_algorithms(False)  # a bare loop would not switch them on
        for _ in range(steps):
            optimizer.zero_grad()
            with runtime.autocast():
                logits = model((images.float() / 255 - mean) / std)
            nn.functional.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
        torch.use_deterministic_algorithms(True)

    return run


def trained_parameters(model: nn.Module, method: str) -> list[nn.Parameter]:
    heads = tuple(f"{name}." for name in classifier_names(model))
    norms = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm2d)))
    chosen = {
        "full": lambda name: True,
        "head": lambda name: False,
        "bias": lambda name: name.endswith(".bias"),
        "norm": lambda name: name.startswith(norms),
    }[method]
    return [p for name, p in model.named_parameters() if chosen(name) or name.startswith(heads)]


def timed(function: Callable[[], None], runtime: process.Runtime) -> float:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
