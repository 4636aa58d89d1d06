"""Lanes and their refill, against what each client would do alone."""

from __future__ import annotations

from collections import defaultdict
from itertools import chain

import pytest
import torch

from fedpeft_dist.training.lane_schedule import ClientTask, Tick, schedule_lanes

BATCH = 4


def task(client: int, size: int, num_steps: int) -> ClientTask:
    # Samples are neither consecutive nor small, and no two clients share one.
    return ClientTask(client, 1000 * client + 7 * torch.arange(size) + 1, num_steps, size)


def epochs(client: int, size: int, num_epochs: int) -> ClientTask:
    return task(client, size, num_epochs * -(-size // BATCH))


def ragged_tasks() -> list[ClientTask]:
    return [epochs(client, size, 2) for client, size in enumerate((9, 1, 4, 17, 3, 8, 30, 5))]


def run(tasks: list[ClientTask], num_lanes: int, seed: int = 1, round_number: int = 0) -> list[Tick]:
    return list(schedule_lanes(tasks, num_lanes, BATCH, seed, round_number))


def by_client(ticks: list[Tick]) -> dict[int, list[tuple[list[int], int]]]:
    """Each client's steps: (its batch, its key)."""
    steps, seated = defaultdict(list), {}
    for tick in ticks:
        for lane, started in tick.starting:
            assert lane not in seated
            seated[lane] = started.client
        for lane, client in seated.items():
            steps[client].append((tick.indices[lane, tick.mask[lane]].tolist(), int(tick.lane_keys[lane])))
        for lane, finished in tick.finished:
            assert seated.pop(lane) == finished.client
    assert not seated
    return dict(steps)


def test_every_epoch_covers_the_samples_once_in_an_order_of_its_own() -> None:
    own = epochs(3, 10, 5)
    batches = [batch for batch, _ in by_client(run([own], 1))[3]]
    assert [len(batch) for batch in batches] == [4, 4, 2] * 5
    orders = [list(chain(*batches[i : i + 3])) for i in range(0, 15, 3)]
    assert all(sorted(order) == own.samples.tolist() for order in orders)
    assert len({tuple(order) for order in orders}) == 5


@pytest.mark.parametrize("num_lanes", [2, 3, 5, 8, 20])
def test_a_clients_steps_do_not_depend_on_the_lanes(num_lanes: int) -> None:
    one_lane = by_client(run(ragged_tasks(), 1))
    assert by_client(run(ragged_tasks(), num_lanes)) == one_lane
    assert by_client(run(ragged_tasks()[::-1], num_lanes)) == one_lane


def test_a_clients_steps_do_not_depend_on_its_neighbours() -> None:
    together = by_client(run(ragged_tasks(), 3))
    for own in ragged_tasks():
        assert by_client(run([own], 3)) == {own.client: together[own.client]}


def test_steps_depend_on_seed_and_round() -> None:
    tasks = ragged_tasks()[3:4]
    variants = [by_client(run(tasks, 1, seed, round_number))[3] for seed in (1, 2) for round_number in (0, 1)]
    orders = {str([batch for batch, _ in steps]) for steps in variants}
    keys = {key for steps in variants for _, key in steps}
    assert len(orders) == 4
    assert len(keys) == sum(len(steps) for steps in variants)


def test_every_client_and_step_has_a_key_of_its_own() -> None:
    steps = by_client(run(ragged_tasks(), 3))
    keys = [key for own in steps.values() for _, key in own]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("num_lanes", [1, 3, 4])
def test_a_free_lane_takes_the_next_client_at_once(num_lanes: int) -> None:
    """The same as a simulation that hands the waiting clients, in order, to the lowest free lanes."""
    tasks = ragged_tasks()
    waiting = [(own.client, own.num_steps) for own in tasks]
    left: dict[int, list[int]] = {}
    expected = []
    while waiting or left:
        for lane in range(num_lanes):
            if lane not in left and waiting:
                left[lane] = list(waiting.pop(0))
        expected.append({lane: client for lane, (client, _) in left.items()})
        for lane in list(left):
            left[lane][1] -= 1
            if not left[lane][1]:
                del left[lane]

    seated: dict[int, int] = {}
    found = []
    for tick in run(tasks, num_lanes):
        seated |= {lane: started.client for lane, started in tick.starting}
        found.append(dict(seated))
        busy = tick.mask.any(dim=1)
        assert busy.tolist() == [lane in seated for lane in range(num_lanes)]
        for lane, _ in tick.finished:
            del seated[lane]
    assert found == expected
    if num_lanes == 1:
        assert len(found) == sum(own.num_steps for own in tasks)


@pytest.mark.parametrize(("size", "num_steps"), [(10, 1), (10, 3), (10, 7), (10, 8), (3, 5), (4, 6), (1, 2)])
def test_a_fixed_number_of_steps_goes_on_into_further_epochs(size: int, num_steps: int) -> None:
    own = task(2, size, num_steps)
    batches = [batch for batch, _ in by_client(run([own, task(5, 6, 2)], 2))[2]]
    assert len(batches) == num_steps
    per_epoch = -(-size // BATCH)
    sizes = [BATCH] * (size // BATCH) + [size % BATCH] * (size % BATCH > 0)
    assert [len(batch) for batch in batches] == [sizes[step % per_epoch] for step in range(num_steps)]
    for start in range(0, num_steps, per_epoch):
        seen = list(chain(*batches[start : start + per_epoch]))
        assert len(set(seen)) == len(seen)
        assert set(seen) <= set(own.samples.tolist())
        if start + per_epoch <= num_steps:
            assert sorted(seen) == own.samples.tolist()


def test_shapes_stay_and_what_is_no_sample_is_masked() -> None:
    ticks = run(ragged_tasks(), 3)
    for tick in ticks:
        assert tick.indices.shape == tick.mask.shape == (3, BATCH)
        assert (tick.indices.dtype, tick.mask.dtype) == (torch.int64, torch.bool)
        assert (tick.indices[~tick.mask] == 0).all()
        assert (tick.indices[tick.mask] > 0).all()
        for row in tick.mask.tolist():
            assert row == sorted(row, reverse=True)  # real samples come first
    assert not ticks[-1].mask.all(dim=1).all()


def test_clients_without_steps_are_left_out() -> None:
    tasks = [task(0, 0, 0), epochs(1, 5, 1), task(2, 6, 0)]
    ticks = run(tasks, 2)
    assert {started.client for tick in ticks for _, started in tick.starting} == {1}
    assert {finished.client for tick in ticks for _, finished in tick.finished} == {1}
    assert run([task(0, 0, 0)], 2) == []
    assert run([], 2) == []


def test_every_client_starts_and_finishes_once() -> None:
    ticks = run(ragged_tasks(), 3)
    started = [own.client for tick in ticks for _, own in tick.starting]
    finished = [own.client for tick in ticks for _, own in tick.finished]
    assert started == list(range(8))
    assert sorted(finished) == started
