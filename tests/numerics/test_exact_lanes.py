"""A client's result does not depend on its lane or on its neighbours: not nearly, but to the bit.

Shapes: L lanes, B batch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fedpeft_dist.config.schema import RuntimeConfig
from fedpeft_dist.lanes.dropout import KeyedDropout, KeyedDropPath
from fedpeft_dist.lanes.ops import lane_aligned
from fedpeft_dist.runtime import process
from fedpeft_dist.training.trainer import RoundStart

from .cases import (
    METHODS,
    OPTIMIZERS,
    VIT,
    client_config,
    make_images,
    make_lane_model,
    make_model,
    make_tasks,
    make_trainer,
    passes_of,
    start_vector,
    train_lanes,
    with_dropout,
)

# Odd and even bottlenecks that no vector register divides; tokens, ranks and batches are odd too.
EXACT_METHODS = {
    **{name: with_dropout(method, 0.2) for name, method in METHODS.items()},
    "adapter-7-per-block": {"name": "adapter", "bottleneck": 7, "shared": False},
    "adapter-10-shared": {"name": "adapter", "bottleneck": 10, "shared": True},
}
SIZES, STEPS = (9, 3, 6, 1, 11, 7), (3, 1, 3, 2, 3, 4)


def make_stochastic_trainer(method: str, lanes: int, batch: int, precision: str, optimizer: str = "adamw"):
    """Dropout and drop-path are on wherever the model and the method have them."""
    model = make_model(*VIT, proj_drop_rate=0.1, drop_path_rate=0.2)
    lane_model = make_lane_model(model, EXACT_METHODS[method])
    kinds = [type(module) for module in lane_model.backbone.model.modules()]
    assert KeyedDropout in kinds
    assert KeyedDropPath in kinds
    vector = start_vector(lane_model)
    client = client_config(OPTIMIZERS[optimizer], batch, clip_norm=1.0, proximal=0.1)
    return make_trainer(lane_model, make_images(), client, lanes, precision=precision), vector


SHAPES = [(3, 4), (5, 3), (4, 1)]  # lanes, batch


def unequal_lanes(method: str, precision: str, lanes: int, batch: int) -> list[int]:
    """Puts one client in every lane; the lanes that end elsewhere than lane 0."""
    trainer, vector = make_stochastic_trainer(method, lanes, batch, precision)
    task = make_tasks([2 * batch + 1], [3])[0]
    assert batch == 1 or not all(one.mask.all() for one in passes_of([task], 1, batch))
    first, *others = list(trainer.train([task] * lanes, RoundStart(0, vector)))
    assert len(others) == lanes - 1
    assert first.delta.abs().max() > 1e-3
    theta = trainer.rule.theta
    return [
        lane
        for lane, update in enumerate(others, start=1)
        if not torch.equal(update.delta, first.delta)
        or not torch.equal(update.loss, first.loss)
        or not torch.equal(theta[lane], theta[0])
    ]


@pytest.mark.parametrize(("lanes", "batch"), SHAPES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", EXACT_METHODS)
def test_the_same_client_in_every_lane_gives_equal_rows(method, precision, lanes, batch):
    assert unequal_lanes(method, precision, lanes, batch) == []


def test_a_run_is_set_up_to_be_exact():
    """The other tests get MKL's setting from conftest.py; a run must get it from `process.start`."""
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    root = str(Path(__file__).parents[__name__.count(".")])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    script = f"from {__name__} import print_unequal; print_unequal()"
    worker = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert worker.returncode == 0, worker.stderr
    assert worker.stdout.splitlines() == ["compared 9"]


def print_unequal() -> None:
    """Run in a process of its own."""
    compared = 0
    with process.start(RuntimeConfig(device="cpu")):
        for method in ("full", "adapter-7-per-block", "lora-all"):
            for lanes, batch in SHAPES:
                unequal = unequal_lanes(method, "fp32", lanes, batch)
                if unequal:
                    print(f"{method}: of {lanes} lanes with batches of {batch}, lanes {unequal} differ from lane 0")
                compared += 1
    print("compared", compared)


@pytest.mark.parametrize("function", [F.gelu, partial(F.gelu, approximate="tanh"), F.silu, torch.sigmoid])
def test_elementwise_functions_do_not_round_by_position(function):
    """A lane of 105 elements ends inside a vector register, where some kernels take another path than before it."""
    for seed in range(50):
        x = torch.randn(1, 105, generator=torch.Generator().manual_seed(seed))
        rows = x.repeat(5, 1).view(75, 7).requires_grad_()
        y = lane_aligned(function, rows, 5)
        y.sum().backward()
        for lanes in (y.detach().view(5, 105), rows.grad.view(5, 105)):
            assert torch.equal(lanes, lanes[:1].expand_as(lanes))
        torch.testing.assert_close(y, function(rows))


def seating(tasks, lanes: int, batch: int) -> dict[int, tuple[int, frozenset[int]]]:
    """Each client's lane and the clients that it ever sat beside."""
    seats, lane_of, beside = {}, {}, {task.client: set() for task in tasks}
    for one in passes_of(tasks, lanes, batch):
        for lane, task, *_ in one.starting:
            seats[lane] = task.client
            lane_of[task.client] = lane
        for client in seats.values():
            beside[client] |= set(seats.values()) - {client}
        for lane, *_ in one.finished:
            del seats[lane]
    return {client: (lane, frozenset(beside[client])) for client, lane in lane_of.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", EXACT_METHODS)
def test_neither_lane_nor_neighbours_change_a_client(method, precision):
    lanes, batch = 3, 4
    trainer, vector = make_stochastic_trainer(method, lanes, batch, precision)
    tasks = make_tasks(SIZES, STEPS)
    # All at once in three orders, then each with nobody beside it.
    orders = [tasks, tasks[::-1], [tasks[i] for i in (2, 5, 0, 3, 1, 4)]]
    seatings = [seating(order, lanes, batch) for order in orders]
    for client in range(len(tasks)):
        assert len({one[client][0] for one in seatings}) > 1, "every client must change lanes"
        assert len({one[client][1] for one in seatings}) > 1, "and neighbours"
    first, *others = (train_lanes(trainer, order, vector) for order in orders)
    others.append({task.client: train_lanes(trainer, [task], vector)[task.client] for task in tasks})
    assert len({update.delta.abs().sum().item() for update in first.values()}) == len(tasks)
    for other in others:
        for client, update in first.items():
            assert torch.equal(update.delta, other[client].delta)
            assert torch.equal(update.loss, other[client].loss)


@pytest.mark.parametrize("method", ["full", "lora-all"])
def test_dropout_matters_in_these_comparisons(method):
    """The comparisons above would prove less if dropout changed nothing."""
    trainer, vector = make_stochastic_trainer(method, 3, 4, "fp32")
    task = make_tasks([4], [1])[0]
    (first,) = trainer.train([task], RoundStart(0, vector))
    (other_round,) = trainer.train([task], RoundStart(1, vector))  # one full batch: only the masks differ
    assert not torch.allclose(first.loss, other_round.loss, rtol=1e-3)
