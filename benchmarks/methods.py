"""Samples per second of every method beside those of `bias`, in turns, and their share of the machine's largest
measured matrix product.

    python benchmarks/methods.py [--methods head bias ...] [--precision fp32 | bf16] [--compile] [--turns 3]

The methods are all that the package has. `to_bias` is the median over the turns of a method's speed over that of bias.
The share counts the operations that a step needs in plain PyTorch, matrix products alone; a method that
benchmarks/bare_methods.py lacks has none. Evaluating the frozen prefix again and again counts as needed, so that a
cache can reach more than 1. The model is the workload glyph's, on one rank with all cores as threads. The script prints
one JSON object.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace

import bare_methods
import ours
import timm
import torch
from contest import machine, race, ratio
from gemm import gemm_peak, step_flops
from workloads import CLASSES, IMAGE_SIZE, Workload, chosen, common_options

CORES = len(os.sched_getaffinity(0))


def main() -> None:
    parser = common_options(__doc__.splitlines()[0])
    parser.set_defaults(turns=3)
    parser.add_argument("--methods", nargs="+", default=list(ours.METHODS), choices=list(ours.METHODS))
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true", help="not for full")
    options = parser.parse_args()
    names = list(dict.fromkeys(["bias", *options.methods]))
    torch.set_num_threads(CORES)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    peak = gemm_peak(torch.device("cpu"), dtype, 256 if options.tiny else 2048, options.seconds)
    workloads = {name: replace(chosen("glyph", options), method=ours.METHODS[name]) for name in names}
    contestants = {
        name: ours.contestant(
            workload, 1, CORES, precision=options.precision, compile=options.compile and name != "full"
        )
        for name, workload in workloads.items()
    }
    results = race(contestants, options.turns, options.seconds)
    for name, result in results.items():
        result["to_bias"] = ratio(results, name, "bias")
        if name in bare_methods.METHODS:
            result["flops_per_sample"] = flops(workloads[name])
            result["share_of_peak"] = result["flops_per_sample"] * result["samples_per_second"] / peak["flops"]
    setting = {"machine": machine(), "turns": options.turns, "precision": options.precision, "peak": peak}
    print(json.dumps({**setting, "methods": results}, indent=1))


def flops(workload: Workload) -> float:
    backbone = workload.backbone()
    model = timm.create_model(backbone["name"], num_classes=CLASSES, img_size=IMAGE_SIZE, **backbone["model_args"])
    bare_methods.attach(model, workload.method)
    return step_flops(model, torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE))


if __name__ == "__main__":
    main()
