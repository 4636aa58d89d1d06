"""The memory that `fedpeft fit` foresees for a rank, beside the memory that a run takes.

    python benchmarks/fit_memory.py

Each config runs one round in a process of its own, on the CPU. `measured` is the run's `peak_memory_bytes`, its peak of
resident memory, less `libraries`: what Python and its libraries take, as a run of a tiny ViT leaves it in the same
process. The C library is told to give freed memory back at once (MALLOC_MMAP_THRESHOLD_), else it would keep some of
what steps before have freed. `error` is foreseen / measured - 1. The script prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from contest import machine

from fedpeft_dist.config.load import parse_config, with_values
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.federation.footprint import Outline
from fedpeft_dist.federation.run import run
from fedpeft_dist.runtime.interrupts import StopRequest
from fedpeft_dist.runtime.memory import used_memory

BASE, SMALL = ("vit_base_patch16_224", 112), ("vit_small_patch16_224", 112)
SWIN = ("swin_tiny_patch4_window7_224", 224)
ALL = ["qkv", "proj", "fc1", "fc2"]
ADAMW = {"name": "adamw"}
INT8 = {"sharding": {"quantize": "int8"}}
CASES: dict[str, tuple[tuple[str, int], dict[str, Any], dict[str, Any], dict[str, Any], tuple[int, int]]] = {
    "bias on ViT-B, fp32": (BASE, {"name": "bias"}, {}, {}, (4, 8)),
    "lora on ViT-B, bf16": (BASE, {"name": "lora", "targets": ALL}, {"precision": "bf16"}, ADAMW, (4, 8)),
    "lora on ViT-B, int8": (BASE, {"name": "lora", "targets": ALL}, INT8, {}, (2, 8)),
    "prompt on ViT-B, fp32": (BASE, {"name": "prompt"}, {}, {}, (3, 8)),
    "adapter on Swin-T, fp32": (SWIN, {"name": "adapter", "shared": False}, {}, ADAMW, (2, 6)),
    "full on ViT-S, fp32": (SMALL, {"name": "full"}, {}, ADAMW, (3, 8)),
}
"""Backbone and image size, method, runtime, client optimizer, lanes and batch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--tiny", action="store_true", help="one tiny model, to see that the program works")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(measure(options.run, options.tiny)))
        return
    results = {}
    for case in options.cases[:1] if options.tiny else options.cases:
        config = make_config(case, options.tiny)
        outline = Outline(config, config.data.classes, config.runtime.precision, is_cuda=False)
        foreseen = outline.measure(config.runtime.lanes, config.client.batch_size)
        results[case] = {"foreseen": foreseen.total, **in_own_process(case, options.tiny)}
        results[case]["error"] = foreseen.total / results[case]["measured"] - 1
        results[case]["parts"] = vars(foreseen)
    print(json.dumps({"machine": machine(), "cases": results}, indent=1))


def in_own_process(case: str, is_tiny: bool) -> dict[str, int]:
    command = [sys.executable, __file__, "--run", case, *(["--tiny"] if is_tiny else [])]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: str, is_tiny: bool) -> dict[str, int]:
    """The peak of a run of one round, less what was resident after a tiny one."""
    peak_of(make_config(case, is_tiny=True))
    libraries = used_memory(torch.device("cpu"))
    return {"measured": peak_of(make_config(case, is_tiny)) - libraries, "libraries": libraries}


def peak_of(config: RunConfig) -> int:
    """A run's `peak_memory_bytes`."""
    with TemporaryDirectory() as folder:
        run(with_values(config, "output", root=folder, name="run"), StopRequest())
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["peak_memory_bytes"]


def make_config(case: str, is_tiny: bool) -> RunConfig:
    (name, image_size), method, runtime, optimizer, (lanes, batch) = CASES[case]
    arguments: dict[str, Any] = {}
    if is_tiny:
        name, image_size, arguments = "vit_tiny_patch16_224", 32, {"depth": 1, "embed_dim": 32, "num_heads": 2}
    return parse_config(
        {
            "backbone": {"name": name, "pretrained": False, "model_args": arguments},
            "method": method,
            "data": {
                "name": "synthetic",
                "image_size": image_size,
                "num_train": lanes * batch,
                "num_test": 16,
                "clients": lanes,
                "partition": {"name": "iid"},
            },
            "federation": {"rounds": 1, "cohort": lanes},
            "client": {"epochs": 2, "batch_size": batch, "optimizer": optimizer or {"name": "sgd"}},
            "runtime": {"device": "cpu", "precision": "fp32", "lanes": lanes, "evaluate_batch": 16, **runtime},
        },
        case,
    )


if __name__ == "__main__":
    main()
