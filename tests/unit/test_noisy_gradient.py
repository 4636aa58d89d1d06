"""DP-SGD's noise: each step of each client has its own, and it follows from the noise seed."""

from __future__ import annotations

import torch

from fedpeft_dist.config.schema import SamplePrivacy
from fedpeft_dist.lanes.parameters import ParameterLayout
from fedpeft_dist.runtime.launch import Launch
from fedpeft_dist.runtime.process import Runtime
from fedpeft_dist.training.batches import PoissonBatches
from fedpeft_dist.training.gradients import NoisyGradient
from fedpeft_dist.training.schedule import ClientTask, Schedule

SEED, ROUND, BATCH = 3, 2, 4
SIZES, STEPS = (9, 3, 6), (5, 2, 5)


def noise_by_step(num_lanes: int, num_slots: int, noise_seed: int = SEED) -> dict[tuple[int, int], tuple[float, ...]]:
    """The noise of each client's steps: the gradient where all samples' gradients are zero."""
    tasks = [
        ClientTask(n, 100 * n + torch.arange(size), steps, size) for n, (size, steps) in enumerate(zip(SIZES, STEPS))
    ]
    batches = PoissonBatches(BATCH, noise_seed)
    rule = NoisyGradient(
        ParameterLayout({"weight": torch.Size([32])}),
        num_lanes,
        num_slots,
        privacy=SamplePrivacy(name="sample", clip_norm=1.0, noise_multiplier=1.0),
        batches=batches,
        noise_multipliers=torch.ones(len(SIZES), dtype=torch.float64),
        largest_client=max(SIZES),
        runtime=Runtime(Launch(), torch.device("cpu"), "fp32", threads=1),
    )
    found = {}
    for current in Schedule(num_lanes, batches, SEED, num_slots).passes(tasks, ROUND):
        if current.stepping:
            gradient, active = rule.gradient(current, ROUND)
            assert active.flatten().nonzero().flatten().tolist() == sorted(client.lane for client in current.stepping)
            found |= {(own.task.client, own.step): tuple(gradient[own.lane].tolist()) for own in current.stepping}
    return found


def test_noise_differs_between_clients_and_steps_and_does_not_depend_on_slots() -> None:
    found = noise_by_step(3, 12)
    assert found == noise_by_step(1, 2)
    assert found.keys() == {(client, step) for client, count in enumerate(STEPS) for step in range(count)}
    assert len(set(found.values())) == 12


def test_another_noise_seed_gives_other_noise() -> None:
    first, second = noise_by_step(2, 8), noise_by_step(2, 8, SEED + 1)
    assert not set(first.values()) & set(second.values())
