"""fp16's loss scale is each client's own: an overflow in one lane is nobody else's business.

The CPU's float16 autocast stands in for a GPU's.

Shapes: L lanes, B batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fedpeft_dist.config.load import parse_config
from fedpeft_dist.data.datasets import ImageSet
from fedpeft_dist.federation.simulation import build_simulation
from fedpeft_dist.lanes import optimizers
from fedpeft_dist.lanes.optimizers import GROWTH_INTERVAL, INITIAL_SCALE, LaneLossScale
from fedpeft_dist.training.trainer import RoundStart, Trainer

from .cases import (
    METHODS,
    OPTIMIZERS,
    VIT,
    client_config,
    make_images,
    make_lane_model,
    make_model,
    make_runtime,
    make_tasks,
    make_trainer,
    start_vector,
    train_lanes,
)

LANES, BATCH = 3, 4
SCALE = 2.0**8
"""Replaces the real initial scale: these models have large gradients, and none should overflow by itself."""
CASES = [("lora-all", "sgd"), ("lora-all", "adamw"), ("full", "adamw"), ("bias", "sgd")]


@dataclass
class Step:
    """Copies of the trainer's tensors before and after a local step."""

    theta: tuple[torch.Tensor, torch.Tensor]
    state: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
    active: torch.Tensor
    scale: tuple[torch.Tensor, torch.Tensor] | None
    good_steps: tuple[torch.Tensor, torch.Tensor] | None


@pytest.fixture
def low_scale(monkeypatch) -> None:
    monkeypatch.setattr(optimizers, "INITIAL_SCALE", SCALE)


def make_fp16_trainer(method: str, optimizer: str, images: ImageSet | None = None, precision: str = "fp16"):
    lane_model = make_lane_model(make_model(*VIT), METHODS[method])
    vector = start_vector(lane_model, noise=0.02)
    client = client_config(OPTIMIZERS[optimizer], BATCH)
    trainer = make_trainer(lane_model, images or make_images(), client, LANES, precision=precision)
    return trainer, vector


def optimizer_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Everything an optimizer keeps for its lanes, a row each."""
    kept = {name: value for name, value in vars(trainer.optimizer).items() if name not in ("config", "step")}
    assert kept
    return {name: torch.as_tensor(value).clone() for name, value in kept.items()}


def watch(trainer: Trainer, before_step: Callable[[int], Any] = lambda step: None) -> list[Step]:
    """Records every local step; `before_step` is called with the step's number before its loss is scaled."""
    steps: list[Step] = []
    found: dict[str, Any] = {}
    logits, optimizer_step = trainer.logits, trainer.optimizer.step

    def scale_state() -> tuple[torch.Tensor, torch.Tensor] | None:
        own = trainer.rule.loss_scale
        return None if own is None else (own.scale.clone(), own.good_steps.clone())

    def watched_logits(*arguments):
        before_step(len(steps))
        found["scale"] = scale_state()
        return logits(*arguments)

    def watched_step(theta, grad, active, lr):
        before, state = theta.clone(), optimizer_state(trainer)
        optimizer_step(theta, grad, active, lr)
        now, after = found["scale"], scale_state()
        scale, good_steps = (None, None) if now is None else zip(now, after)
        steps.append(Step((before, theta.clone()), (state, optimizer_state(trainer)), active[:, 0], scale, good_steps))

    trainer.logits, trainer.optimizer.step = watched_logits, watched_step
    return steps


def assert_lane_untouched(step: Step, lane: int) -> None:
    assert not step.active[lane]
    assert torch.equal(step.theta[0][lane], step.theta[1][lane])
    for name, before in step.state[0].items():
        assert torch.equal(before[lane], step.state[1][name][lane]), name


def with_huge_images(images: ImageSet, samples: torch.Tensor) -> ImageSet:
    """These samples overflow float16 in the first layer; no step on them can be finite."""
    huge = images.images.float()
    huge[samples] = 1e9
    return dataclasses.replace(images, images=huge)


@pytest.mark.usefixtures("low_scale")
@pytest.mark.parametrize(("method", "optimizer"), CASES)
def test_an_overflow_skips_one_step_of_one_lane(method, optimizer):
    """Lane 1's gradient overflows at its second step of four, for a scale that is much too large."""
    tasks = make_tasks((9, 7, 8), (4, 4, 4))
    benign_trainer, vector = make_fp16_trainer(method, optimizer)
    benign = watch(benign_trainer)
    expected = train_lanes(benign_trainer, tasks, vector)
    trainer, _ = make_fp16_trainer(method, optimizer)

    def overflow(step: int) -> None:
        if step == 1:
            trainer.rule.loss_scale.scale[1] = 2.0**110
        if step == 2:
            trainer.rule.loss_scale.scale[1] = SCALE

    steps = watch(trainer, overflow)
    updates = train_lanes(trainer, tasks, vector)

    assert len(steps) == len(benign) == 4
    assert all(step.active.all() for step in benign), "nothing overflows by itself"
    assert_lane_untouched(steps[1], 1)
    assert steps[1].active.tolist() == [True, False, True]
    assert steps[1].scale[1][1] == 2.0**109
    assert steps[1].good_steps[1].tolist() == [2, 0, 2]
    assert steps[2].active.all()
    for lane in (0, 2):
        for own, other in zip(steps, benign):
            assert torch.equal(own.theta[1][lane], other.theta[1][lane])
            assert own.scale[1][lane] == other.scale[1][lane] == SCALE
        assert torch.equal(updates[lane].delta, expected[lane].delta)
        assert torch.equal(updates[lane].loss, expected[lane].loss)
    assert not torch.equal(updates[1].delta, expected[1].delta)
    assert torch.isfinite(updates[1].delta).all()
    if optimizer == "adamw":
        assert steps[-1].state[1]["steps"].flatten().tolist() == [4, 3, 4]


@pytest.mark.usefixtures("low_scale")
@pytest.mark.parametrize(("method", "optimizer"), CASES)
def test_a_client_that_always_overflows_stays_where_it_began(method, optimizer):
    """Its scale halves at each step; its neighbours, and the client after it in its lane, notice nothing."""
    tasks = make_tasks((9, 7, 8, 5), (5, 2, 5, 3))
    results = []
    for images in (make_images(), with_huge_images(make_images(), tasks[1].samples)):
        trainer, vector = make_fp16_trainer(method, optimizer, images)
        results.append((watch(trainer), train_lanes(trainer, tasks, vector)))
    (benign, expected), (steps, updates) = results
    assert len(steps) == len(benign) == 5
    for number in (0, 1):
        assert_lane_untouched(steps[number], 1)
        assert steps[number].scale[1][1] == SCALE / 2 ** (number + 1)
        assert steps[number].good_steps[1][1] == 0
    assert not updates[1].delta.any()
    assert expected[1].delta.any()
    # The next client in lane 1 starts with a scale and a counter of its own.
    assert steps[2].scale[0][1] == SCALE
    assert steps[2].good_steps[0][1] == 0
    assert steps[2].good_steps[0].tolist() == [2, 0, 2]
    for client in (0, 2, 3):
        assert expected[client].delta.any()
        assert torch.equal(updates[client].delta, expected[client].delta)
        assert torch.equal(updates[client].loss, expected[client].loss)


@pytest.mark.usefixtures("low_scale")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("method", "optimizer"), CASES)
def test_an_idle_lane_is_untouched_and_touches_nobody(method, optimizer, precision):
    """Lane 1 is done after two steps of five, and nobody takes its place."""
    trainer, vector = make_fp16_trainer(method, optimizer, precision=precision)
    steps = watch(trainer)
    short = train_lanes(trainer, make_tasks((9, 7, 8), (5, 2, 5)), vector)
    other, _ = make_fp16_trainer(method, optimizer, precision=precision)
    long_steps = watch(other)
    long = train_lanes(other, make_tasks((9, 7, 8), (5, 5, 5)), vector)
    assert [step.active.tolist() for step in steps] == [[True] * 3] * 2 + [[True, False, True]] * 3
    assert all(step.active.all() for step in long_steps)
    for step in steps[2:]:
        assert_lane_untouched(step, 1)
        if precision == "fp16":
            assert step.scale[1][1] == step.scale[0][1]
            assert step.good_steps[1][1] == step.good_steps[0][1]
    for client in (0, 2):
        assert short[client].delta.any()
        assert torch.equal(short[client].delta, long[client].delta)
        assert torch.equal(short[client].loss, long[client].loss)
    assert not torch.equal(short[1].delta, long[1].delta)


@pytest.mark.usefixtures("low_scale")
@pytest.mark.parametrize("method", ["full", "bias", "lora-all", "adapter-shared", "prompt-deep"])
def test_fp16_lands_near_fp32(method):
    """The scale is divided out again: what is left is float16's own rounding."""
    tasks = make_tasks((9, 7, 8, 5), (3, 2, 3, 3))
    half, vector = make_fp16_trainer(method, "sgd")
    single, _ = make_fp16_trainer(method, "sgd", precision="fp32")
    updates, expected = train_lanes(half, tasks, vector), train_lanes(single, tasks, vector)
    for client, update in updates.items():
        difference = (update.delta - expected[client].delta).norm()
        assert 0 < difference < 0.02 * expected[client].delta.norm()


def test_scale_grows_after_the_interval_and_halves_on_overflow():
    """Lane 0 never overflows, lane 1 does once, halfway; lane 2 is idle and keeps what it has."""
    own = LaneLossScale(3)
    active = torch.tensor([[True], [True], [False]])
    half = GROWTH_INTERVAL // 2
    for step in range(1, 2 * GROWTH_INTERVAL + 1):
        grad = own.scale.unsqueeze(1) * torch.tensor([[1.0, -2.0]] * 3)
        grad[2, 0] = float("nan")
        if step == half:
            grad[1, 1] = float("inf")
        took = own.unscale(grad, active)
        assert took.tolist() == [[True], [step != half], [False]]
        assert grad[0].tolist() == [1.0, -2.0]
        assert own.scale[0] == INITIAL_SCALE * 2 ** (step // GROWTH_INTERVAL)
        assert own.good_steps[0] == step % GROWTH_INTERVAL
        if step >= half:
            assert own.scale[1] == INITIAL_SCALE / 2 * 2 ** ((step - half) // GROWTH_INTERVAL)
            assert own.good_steps[1] == (step - half) % GROWTH_INTERVAL
    assert own.scale[2] == INITIAL_SCALE
    assert own.good_steps[2] == 0
    assert own.scale.tolist() == [INITIAL_SCALE * 4, INITIAL_SCALE, INITIAL_SCALE]
    own.reset(0)
    assert own.scale[0] == INITIAL_SCALE
    assert own.good_steps[0] == 0
    assert own.good_steps[1] == half


def test_no_step_is_lost_to_the_initial_scale():
    """Every client starts afresh, so a scale that must first come down would cost each of them steps in each round.

    On the pre-trained backbone with its new head, where gradients are at their largest, for clients of few classes.
    """
    deltas = {}
    for precision in ("fp32", "fp16"):
        config = parse_config(
            {
                "backbone": {"name": "glyph_vit"},
                "method": {"name": "bias"},
                "data": {
                    "name": "digits",
                    "max_train": 200,
                    "clients": 8,
                    "partition": {"name": "dirichlet", "alpha": 0.1, "min_samples": 5},
                },
                "federation": {"cohort": 4},
                "client": {"steps": 3, "batch_size": 16},
                "runtime": {"lanes": 4},
            },
            "test",
        )
        simulation = build_simulation(config, make_runtime(precision))
        setup, steps = simulation.setup, watch(simulation.trainer)
        updates = simulation.trainer.train(setup.tasks(range(4)), RoundStart(0, setup.initial_vector))
        deltas[precision] = {update.client: update.delta for update in updates}
        assert [step.active.tolist() for step in steps] == [[True] * 4] * 3
    for client, expected in deltas["fp32"].items():
        assert 0 < (deltas["fp16"][client] - expected).norm() < 0.02 * expected.norm()
