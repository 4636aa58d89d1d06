"""What benchmarks/on_gpu.sh runs: the parts, one after the other, each within its share of the time.

A part that fails leaves its error in the file, and the next part starts. A figure that the time did not suffice for is
null. All weights and images are random.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gemm import gemm_peak
from gpu_parts import Cell, check_lanes, compare_lanes, measure_method
from gpu_sizes import FULL, METHODS, SMALL, Sizes

BUDGET_SECONDS = 460
"""For all parts; on_gpu.sh ends the process 15 seconds later."""
SECONDS = {"gemm": 15, "exactness": 70, "tests": 70, "methods": 140, "compile": 80, "lanes": 40, "cell": 45}
"""For each part. A part that ends early leaves its time to the next ones."""


@dataclass
class Clock:
    """The time that a part has left."""

    end: float

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


class Report:
    """The JSON file, written anew after each part."""

    def __init__(self, path: Path, budget: float):
        self.path, self.end, self.content = path, time.monotonic() + budget, {}

    def run(self, name: str, part: Callable[[Clock], Iterator[tuple[str, Any]]]) -> None:
        """Runs a part, which yields its figures by name."""
        started, found = time.monotonic(), self.content.setdefault(name, {})
        later = list(SECONDS)[list(SECONDS).index(name) + 1 :]
        end = self.end - sum(SECONDS[other] for other in later)  # with what the parts before have left
        try:
            for key, value in part(Clock(end)):
                found[key] = value
                self.write()
        except Exception as error:
            traceback.print_exc()
            found["error"] = f"{type(error).__name__}: {error}"[:500]
        found["part_seconds"] = round(time.monotonic() - started, 2)
        self.write()
        print(f"{name}: {found['part_seconds']} s{', FAILED' if 'error' in found else ''}", file=sys.stderr)

    def write(self) -> None:
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.content, indent=1) + "\n")
        beside.replace(self.path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("on_gpu.json"))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="tiny sizes: a trial of this script")
    parser.add_argument("--parts", nargs="+", default=list(SECONDS), choices=list(SECONDS))
    options = parser.parse_args()
    sizes = SMALL if options.small else FULL
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device: cuda, but PyTorch finds no CUDA device here; give cpu, with --small")
    device = torch.device(options.device)
    report = Report(options.output, BUDGET_SECONDS)
    report.content["machine"] = describe(device)
    parts = {
        "gemm": lambda clock: gemm(device, sizes),
        "exactness": lambda clock: exactness(device, sizes, clock),
        "tests": lambda clock: run_tests(device),
        "methods": lambda clock: methods(device, sizes, clock, report.content),
        "compile": lambda clock: compiled(device, sizes, clock),
        "lanes": lambda clock: lanes(device, sizes, clock),
        "cell": lambda clock: cell(device, sizes, clock),
    }
    for name in options.parts:
        report.run(name, parts[name])
        clean()
    if any("error" in part for part in report.content.values()):
        raise SystemExit(1)


def describe(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"device": "cpu", "torch": torch.__version__}
    own = torch.cuda.get_device_properties(device)
    figures = {"memory_bytes": own.total_memory, "capability": f"{own.major}.{own.minor}", "cuda": torch.version.cuda}
    return {"device": own.name, **figures, "torch": torch.__version__}


def gemm(device: torch.device, sizes: Sizes) -> Iterator[tuple[str, Any]]:
    """The largest speed of a matrix product, in FLOP/s."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        yield name, gemm_peak(device, dtype, sizes.gemm, sizes.seconds)


def exactness(device: torch.device, sizes: Sizes, clock: Clock) -> Iterator[tuple[str, Any]]:
    """Whether a client's delta is the same to the bit in every lane, beside every neighbour.

    Raises:
        RuntimeError: some delta is not, once all have been tried.
    """
    found = {}
    for precision in ("bf16", "fp32"):
        for method in METHODS:
            for number in sizes.exact_lanes:
                name = f"{method}, {precision}, {number} lanes"
                found[name] = check_lanes(sizes, method, precision, number, device) if clock.left > 3 else None
                yield name, found[name]
                clean()
    if unequal := [name for name, one in found.items() if one and not one["equal"]]:
        raise RuntimeError(f"a delta depends on its lane: {'; '.join(unequal)}")


def run_tests(device: torch.device) -> Iterator[tuple[str, Any]]:
    """tests/numerics/test_cuda.py, where pytest is installed and a GPU is at hand."""
    if device.type != "cuda" or find_spec("pytest") is None:
        yield "skipped", "no GPU" if device.type != "cuda" else "pytest is not installed; the part `exactness` remains"
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/numerics/test_cuda.py"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS["tests"])
    except subprocess.TimeoutExpired:
        yield "unfinished", f"after {SECONDS['tests']} seconds"
        return
    yield "summary", (ended.stdout.strip().splitlines() or [""])[-1]
    yield "passed", ended.returncode == 0
    if ended.returncode:
        raise RuntimeError(ended.stdout[-400:])


def methods(device: torch.device, sizes: Sizes, clock: Clock, content: dict) -> Iterator[tuple[str, Any]]:
    """Images per second of each method, beside a bare loop with the same batch, and the share of the matrix product."""
    peak = content.get("gemm", {}).get("bf16", {}).get("flops")
    for method in [*METHODS, "full"]:
        yield method, measure_method(sizes, method, device, peak=peak, loop=True) if clock.left > 8 else None
        clean()


def compiled(device: torch.device, sizes: Sizes, clock: Clock) -> Iterator[tuple[str, Any]]:
    """The same with runtime.compile."""
    for method in ("bias", "lora", "prompt"):
        yield method, measure_method(sizes, method, device, compile=True) if clock.left > 25 or sizes is SMALL else None
        clean()


def lanes(device: torch.device, sizes: Sizes, clock: Clock) -> Iterator[tuple[str, Any]]:
    """A small model on 16 lanes against one client after another."""
    for method in ("bias", "lora", "head"):
        yield method, compare_lanes(sizes, method, device) if clock.left > 8 else None
        clean()


def cell(device: torch.device, sizes: Sizes, clock: Clock) -> Iterator[tuple[str, Any]]:
    """The time of one cell of the paper's CIFAR-100 table, from a part of one round."""
    yield "bias", Cell(sizes, device).measure()


def clean() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
