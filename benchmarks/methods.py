"""Samples per second of every method beside those of `bias`, in turns, and their share of the machine's largest
measured matrix product.

    python benchmarks/methods.py [--methods head bias ...] [--precision fp32 | bf16] [--compile] [--turns 3]

The methods are all that the package has. They take turns in groups, and `bias` is in each group. `to_bias` is the
median over the turns of a method's speed over that of bias. The share counts the operations that a step needs in plain
PyTorch, matrix products alone; a method that bare_methods.py lacks has none. Evaluating the frozen prefix again and
again counts as needed, so that a cache can reach more than 1. The model is the workload glyph's, on one rank with all
cores as threads. The script prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from typing import Any

import bare_methods
import ours
import timm
import torch
from contest import Contestant, machine, race, ratio
from gemm import gemm_peak, step_flops
from workloads import CLASSES, IMAGE_SIZE, Workload, chosen, common_options

CORES = len(os.sched_getaffinity(0))
GROUP = 5
"""Methods that race with bias at once. Each is a process with a model of its own."""


def main() -> None:
    parser = common_options(__doc__.splitlines()[0])
    parser.set_defaults(turns=3, seconds=0.5)
    parser.add_argument("--methods", nargs="+", default=list(ours.METHODS), choices=list(ours.METHODS))
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true", help="not for full")
    options = parser.parse_args()
    torch.set_num_threads(CORES)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    peak = gemm_peak(torch.device("cpu"), dtype, 256 if options.tiny else 2048, options.seconds)
    others, results = [name for name in options.methods if name != "bias"], {}
    for first in range(0, max(1, len(others)), GROUP):
        results |= race_with_bias(others[first : first + GROUP], options)
    for name, result in results.items():
        if name in bare_methods.METHODS:
            result["flops_per_sample"] = flops(workload_of(name, options))
            result["share_of_peak"] = result["flops_per_sample"] * result["samples_per_second"] / peak["flops"]
    setting = {"machine": machine(), "turns": options.turns, "precision": options.precision, "peak": peak}
    print(json.dumps({**setting, "methods": results}, indent=1))


def race_with_bias(names: list[str], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    def contestant(name: str) -> Contestant:
        is_compiled = options.compile and name != "full"
        return ours.contestant(workload_of(name, options), 1, CORES, precision=options.precision, compile=is_compiled)

    results = race({name: contestant(name) for name in ("bias", *names)}, options.turns, options.seconds)
    return {name: {"to_bias": ratio(results, name, "bias"), **result} for name, result in results.items()}


def workload_of(name: str, options: argparse.Namespace) -> Workload:
    return replace(chosen("glyph", options), method=ours.METHODS[name])


def flops(workload: Workload) -> float:
    backbone = workload.backbone()
    model = timm.create_model(backbone["name"], num_classes=CLASSES, img_size=IMAGE_SIZE, **backbone["model_args"])
    bare_methods.attach(model, workload.method)
    return step_flops(model, torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE))


if __name__ == "__main__":
    main()
