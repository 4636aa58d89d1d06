"""The measurements of benchmarks/on_gpu.py.

Shapes: L lanes, B batch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import ours
import timm
import torch
from bare_methods import attach
from gemm import step_flops, synchronize
from gpu_sizes import METHODS, Sizes
from torch import nn

from fedpeft_dist.config.load import parse_config
from fedpeft_dist.runtime import process
from fedpeft_dist.runtime.memory import forget_peak_memory, peak_memory
from fedpeft_dist.training.trainer import RoundStart

PAPER_COHORT, PAPER_EPOCHS, PAPER_ROUNDS, PAPER_TESTS = 8, 10, 50, 10_000
CLASSES = 100


def check_lanes(sizes: Sizes, method: str, precision: str, lanes: int, device: torch.device) -> dict[str, Any]:
    """Trains one client in each of the lanes in turn, each time beside other neighbours, and compares its deltas.

    The client's data and its random numbers do not depend on its lane. So all its deltas must have the same bits.
    """
    tree = sizes.tree(METHODS[method], sizes.base, device.type, precision=precision, lanes=lanes)
    tree["data"]["partition"]["samples"] = tree["client"]["batch_size"] = sizes.exact_batch
    tree["federation"]["cohort"], tree["client"]["steps"] = lanes, 2
    config = parse_config(tree, "on_gpu")
    with process.start(config.runtime) as runtime:
        simulation = ours.Rounds(config, runtime).simulation
        start, deltas = RoundStart(0, simulation.setup.initial_vector), []
        for lane in sorted({0, 1, lanes // 2, lanes - 1}):
            neighbours = [1 + (lane * 7 + n) % 60 for n in range(lanes - 1)]
            clients = [*neighbours[:lane], 0, *neighbours[lane:]]
            updates = simulation.trainer.train(simulation.setup.tasks(clients), start)
            deltas += [update.delta for update in updates if update.client == 0]
    apart = max(float((delta - deltas[0]).abs().max()) for delta in deltas)
    return {
        "equal": all(torch.equal(delta, deltas[0]) for delta in deltas),
        "largest_difference": apart,
        "largest_change": float(deltas[0].abs().max()),
    }


def measure_method(
    sizes: Sizes,
    method: str,
    device: torch.device,
    *,
    compile: bool = False,
    loop: bool = False,
    peak: float | None = None,
) -> dict[str, Any]:
    """Images per second of whole rounds with `lanes: auto`.

    Args:
        loop: also measure a bare loop with batches of B.
        peak: FLOP/s of the largest matrix product.
    """
    section = METHODS.get(method, {"name": method})
    config = parse_config(sizes.tree(section, sizes.base, device.type, precision="auto", compile=compile), "on_gpu")
    with process.start(config.runtime) as runtime:
        forget_peak_memory(device)
        rounds = ours.Rounds(config, runtime)
        first, _ = timed(lambda: rounds.run(1), device)
        speed = images_per_second(counting(rounds, sizes.cohort * sizes.steps * sizes.batch), device, sizes.seconds)
        found = {
            "images_per_second": speed,
            "lanes": rounds.simulation.config.runtime.lanes,
            "precision": runtime.precision,
            "peak_memory_bytes": peak_memory(device),
            "first_round_seconds": first,
        }
        model = bare_model(section, sizes, device)
        found["flops_per_image"] = step_flops(model, torch.zeros(2, 3, sizes.image, sizes.image, device=device))
        if peak:
            found["share_of_peak"] = speed * found["flops_per_image"] / peak
        if loop:
            step = bare_step(model, sizes.batch, sizes.image, runtime)
            found["loop_images_per_second"] = images_per_second(step, device, sizes.seconds)
            found["over_loop"] = speed / found["loop_images_per_second"]
    return found


def compare_lanes(sizes: Sizes, method: str, device: torch.device) -> dict[str, Any]:
    """ViT-Tiny: clients side by side against the same clients one after another, in turns."""
    contestants, found = {}, {}
    for lanes in (sizes.many_lanes, 1):
        tree = sizes.tree(METHODS[method], sizes.small, device.type, precision="auto", lanes=lanes)
        tree["federation"]["cohort"] = sizes.many_lanes
        tree["client"]["batch_size"] = tree["data"]["partition"]["samples"] = sizes.many_batch
        config = parse_config(tree, "on_gpu")
        with process.start(config.runtime) as runtime:
            images = sizes.many_lanes * sizes.steps * sizes.many_batch
            contestants[lanes] = counting(ours.Rounds(config, runtime), images)
    with process.start(config.runtime):
        turns = [{n: images_per_second(c, device, sizes.seconds / 5) for n, c in contestants.items()} for _ in range(5)]
    found = {f"images_per_second_{n}_lanes": statistics.median(turn[n] for turn in turns) for n in contestants}
    return found | {"ratio": statistics.median(turn[sizes.many_lanes] / turn[1] for turn in turns)}


class Cell:
    """A cell of the paper's CIFAR-100 table: ViT-B/16, 64 clients, cohort 8, 10 epochs, batch 64, 50 rounds.

    A round of one local epoch and an evaluation of a part of the test images are measured. The time of a cell is
    extrapolated from them. Images are random and have 224 pixels already, so enlarging them from 32 is not in it.
    """

    def __init__(self, sizes: Sizes, device: torch.device):
        self.sizes, self.device = sizes, device
        tree = sizes.tree(METHODS["bias"], sizes.base, device.type, precision="auto")
        tree["data"] |= {"num_train": max(2048, sizes.cell_samples), "num_test": sizes.cell_tests}
        if sizes.image != 224:
            tree["data"]["num_train"] = sizes.cell_samples
        tree["data"] |= {"augment": "crop_flip", "partition": {"name": "pool", "samples": sizes.cell_samples}}
        tree["federation"]["cohort"] = PAPER_COHORT
        tree["client"] = {"epochs": 1, "batch_size": sizes.batch}
        self.config = parse_config(tree, "on_gpu")

    def measure(self) -> dict[str, Any]:
        with process.start(self.config.runtime) as runtime:
            rounds = ours.Rounds(self.config, runtime)
            setup, state = rounds.simulation.setup, rounds.state
            tasks = setup.tasks(range(2), {0: 2, 1: 2})  # two short clients warm up
            list(rounds.simulation.trainer.train(tasks, RoundStart(0, state.vector)))
            setup.evaluate(state.vector)
            epoch, samples = timed(lambda: rounds.run(1), self.device)
            evaluation, _ = timed(lambda: setup.evaluate(state.vector), self.device)
        evaluation *= PAPER_TESTS / self.sizes.cell_tests
        seconds = PAPER_ROUNDS * (PAPER_EPOCHS * epoch + evaluation)
        return {
            "seconds_per_round_of_one_epoch": epoch,
            "samples_in_it": samples,
            "seconds_per_evaluation_extrapolated": evaluation,
            "hours_per_cell_extrapolated": seconds / 3600,
            "extrapolated_from": f"one epoch of {PAPER_EPOCHS}, one round of {PAPER_ROUNDS}, "
            f"{self.sizes.cell_tests} test images of {PAPER_TESTS}",
        }


def bare_model(method: dict[str, Any], sizes: Sizes, device: torch.device) -> nn.Module:
    arguments = {"img_size": sizes.image, **sizes.base.get("model_args", {})}
    model = timm.create_model(sizes.base["name"], num_classes=CLASSES, **arguments).eval()
    attach(model, method)
    return model.to(device)


def bare_step(model: nn.Module, batch: int, image: int, runtime: process.Runtime) -> Callable[[int], int]:
    """Steps of a bare loop in the precision of the run, with the same optimizer."""
    images = torch.randn(batch, 3, image, image, device=runtime.device)
    labels = torch.randint(0, CLASSES, (batch,), device=runtime.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.01, 0.9, weight_decay=1e-4, nesterov=True)

    def steps(number: int) -> int:
        torch.use_deterministic_algorithms(False)  # a bare loop would not switch them on
        for _ in range(number):
            optimizer.zero_grad()
            with runtime.autocast():
                logits = model(images)
            nn.functional.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
        torch.use_deterministic_algorithms(True)
        return number * batch

    return steps


def counting(rounds: ours.Rounds, images: int) -> Callable[[int], int]:
    """Trains rounds and returns their images, which the config tells; a fake GPU cannot count."""

    def run(number: int) -> int:
        rounds.run(number)
        return number * images

    return run


def images_per_second(run: Callable[[int], int], device: torch.device, seconds: float) -> float:
    """The median over as many calls as fit, three at least; the first call warms up."""
    run(1)
    speeds, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(speeds) < 3:
        elapsed, images = timed(lambda: run(1), device)
        speeds.append(images / elapsed)
    return statistics.median(speeds)


def timed(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    synchronize(device)
    started = time.perf_counter()
    result = function()
    synchronize(device)
    return time.perf_counter() - started, result
