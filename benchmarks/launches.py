"""What a local step of all lanes asks of a GPU, beside a bare PyTorch step of the same method: launches and waits.

    dry_cuda/run.sh benchmarks/launches.py [--methods bias lora ...] [--precision bf16] [--lanes 8] [--kernels]

It needs no GPU. dry_cuda, which is no part of this package, is a CUDA runtime that counts and computes nothing. Its
`run.sh` starts Python on fake devices, where the package and PyTorch run unchanged.

The package trains a client in each lane. The bare step, on the methods in bare_methods.py, trains one model on as many
images in one batch. Its images are ready on the device, and its frozen matrices are in the compute type. A launch is a
kernel, a matrix product, a copy or a fill on the device. The methods have their default settings; the cache of the
frozen prefix is off. The script prints one JSON object; `ratio` is the package's launches over the bare step's.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ours
import torch
from bare_methods import METHODS
from gpu_parts import bare_model, bare_step
from gpu_sizes import FULL, TINY, Sizes
from torch import nn

from fedpeft_dist.config.load import parse_config
from fedpeft_dist.runtime import process

try:
    import dry_cuda
except ImportError:
    told = "error: benchmarks/launches.py counts on fake devices only; start it with dry_cuda's run.sh"
    raise SystemExit(told) from None

STEPS = 3
"""Local steps of a round that are enough for PyTorch to take all memory it needs."""


def main() -> None:
    names = [name for name in ours.METHODS if name in METHODS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=names, choices=names)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--lanes", type=int, default=8, help="at least 2")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tiny", action="store_true", help="a small model: to see that the program works")
    parser.add_argument(
        "--kernels", action="store_true", help="also tell on standard error which kernels run how often"
    )
    options = parser.parse_args()
    sizes = replace(FULL, batch=options.batch, cohort=options.lanes)
    if options.tiny:
        sizes = replace(sizes, image=32, base={**sizes.base, "model_args": TINY})
    results = {}
    for name in options.methods:
        own, bare = (count({"name": name}, sizes, options) for count in (count_lanes, count_bare))
        if options.kernels:
            explain(name, own, bare)
        found = {"package": figures(own), "bare": figures(bare)}
        results[name] = {**found, "ratio": round(found["package"]["launches"] / found["bare"]["launches"], 2)}
    setting = {"model": sizes.base["name"], **{key: getattr(options, key) for key in ("precision", "lanes", "batch")}}
    print(json.dumps({**setting, "torch": torch.__version__, "methods": results}, indent=1))


def count_lanes(method: dict[str, Any], sizes: Sizes, options: argparse.Namespace) -> dry_cuda.Counter:
    """The events of one local step of all lanes: those by which two rounds differ."""
    tree = sizes.tree(method, sizes.base, "auto", precision=options.precision, lanes=options.lanes, cache="none")
    config = parse_config(tree, "launches")
    with process.start(config.runtime) as runtime:
        simulation = ours.Rounds(config, runtime).simulation
        clients, start = range(options.lanes), simulation.start(simulation.aggregation(simulation.initial_state()))

        def train(steps: int) -> None:
            for _ in simulation.trainer.train(simulation.setup.tasks(clients, dict.fromkeys(clients, steps)), start):
                pass

        train(STEPS)
        short, long = (counted(lambda steps=steps: train(steps)) for steps in (STEPS, STEPS + 1))
    return long - short


def count_bare(method: dict[str, Any], sizes: Sizes, options: argparse.Namespace) -> dry_cuda.Counter:
    """The events of one step of the bare loop."""
    config = parse_config(sizes.tree(method, sizes.base, "auto", precision=options.precision), "launches")
    with process.start(config.runtime) as runtime:
        # A call of cuDNN's attention is several kernels, which nothing can count. Flash attention's can be counted.
        torch.backends.cuda.enable_cudnn_sdp(False)
        model = bare_model(method, sizes, runtime.device)
        cast_frozen(model, runtime.compute_dtype)
        step = bare_step(model, options.lanes * options.batch, sizes.image, runtime)
        step(STEPS)
        return counted(lambda: step(1))


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the frozen matrices once, as autocast would at every step. Norms and tokens stay."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and "norm" not in name and name.startswith(("blocks.", "patch_embed.")):
            parameter.data = parameter.data.to(dtype)


def counted(function: Callable[[], object]) -> dry_cuda.Counter:
    gc.collect()
    with dry_cuda.Counter() as counter:
        function()
    return counter


def figures(counter: dry_cuda.Counter) -> dict[str, int]:
    kinds = counter.kinds
    return {
        "launches": sum(kinds[kind] for kind in dry_cuda.WORK),
        "products": kinds["gemms"],
        "copies_to_device": kinds["to_device"],
        "waits": kinds["syncs"],
    }


def explain(name: str, own: dry_cuda.Counter, bare: dry_cuda.Counter) -> None:
    """Tells how often each kernel runs in either step; the largest differences first."""
    kinds = {key: (own.names[key], bare.names[key]) for key in Counter(own.names) | Counter(bare.names)}
    print(f"{name}: package, bare, kernel", file=sys.stderr)
    for (kind, kernel), (ours_, bares) in sorted(kinds.items(), key=lambda item: item[1][1] - item[1][0]):
        if kind in dry_cuda.WORK and (ours_ or bares):
            plain = subprocess.run(["c++filt", kernel], capture_output=True, text=True).stdout.strip()
            print(f"  {ours_:5} {bares:5} {kind:9} {plain[:180]}", file=sys.stderr)


if __name__ == "__main__":
    main()
