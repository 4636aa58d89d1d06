"""Lanes and rows: each client goes through its own batches, whoever trains beside it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import islice

import pytest
import torch

from fedpeft_dist.training.batches import EpochBatches, PoissonBatches
from fedpeft_dist.training.schedule import ClientTask, Pass, Schedule

BATCH, SEED, ROUND = 4, 3, 2
EPOCH_BATCHES, POISSON_BATCHES = EpochBatches(BATCH, SEED), PoissonBatches(BATCH, SEED)
Step = tuple[list[int], set[int]]
"""The samples of a client's local step, and the keys of its rows."""


def task(client: int, size: int, num_steps: int) -> ClientTask:
    # Samples are neither consecutive nor small, and no two clients share one.
    return ClientTask(client, 1000 * client + 7 * torch.arange(size) + 1, num_steps, size)


def epochs(client: int, size: int, num_epochs: int) -> ClientTask:
    return task(client, size, num_epochs * -(-size // BATCH))


def ragged_tasks() -> list[ClientTask]:
    return [epochs(client, size, 2) for client, size in enumerate((9, 1, 4, 17, 3, 8, 30, 5))]


def make_tasks(sizes: Iterable[int], steps: Iterable[int]) -> list[ClientTask]:
    return [task(client, size, count) for client, (size, count) in enumerate(zip(sizes, steps))]


def by_lanes(tasks: list[ClientTask], num_lanes: int, seed: int = SEED, round_number: int = ROUND) -> list[Pass]:
    """The passes of clients that go through their samples in epochs: a lane has a row for its whole batch."""
    return list(Schedule(num_lanes, EpochBatches(BATCH, seed), seed).passes(tasks, round_number))


def by_slots(
    tasks: list[ClientTask], num_lanes: int, num_slots: int, batches: EpochBatches = POISSON_BATCHES
) -> list[Pass]:
    """The passes of clients that draw their batches at random: each row holds one sample."""
    return list(Schedule(num_lanes, batches, SEED, num_slots).passes(tasks, ROUND))


def steps_by_client(passes: list[Pass]) -> dict[int, list[Step]]:
    """Each client's steps, in order. Checks what each pass says of the clients in its lanes."""
    seats: dict[int, ClientTask] = {}
    samples, keys, steps = defaultdict(list), defaultdict(set), defaultdict(list)
    for current in passes:
        for lane, own, step, num_samples in current.starting:
            assert lane not in seats
            assert (step, num_samples) == (0, 0)
            seats[lane] = own
        for row in current.mask.any(dim=1).nonzero().flatten().tolist():
            lane = int(current.lanes[row])
            held = current.indices[row][current.mask[row]].tolist()
            assert set(held) <= set(seats[lane].samples.tolist())
            samples[lane] += held
            keys[lane].add(int(current.row_keys[row]))
        for lane, own, step, num_samples in current.stepping:
            assert seats[lane] is own
            assert step == len(steps[own.client])
            steps[own.client].append((samples.pop(lane, []), keys.pop(lane, set())))
            assert num_samples == sum(len(batch) for batch, _ in steps[own.client])
        for lane, own, step, num_samples in current.finished:
            assert seats.pop(lane) is own
            assert step == own.num_steps == len(steps[own.client])
            assert num_samples == sum(len(batch) for batch, _ in steps[own.client])
    assert not seats
    assert not samples
    assert all(len(found) <= 1 for own in steps.values() for _, found in own), "all rows of a step have one key"
    return dict(steps)


def batches_by_client(passes: list[Pass]) -> dict[int, list[list[int]]]:
    return {client: [batch for batch, _ in steps] for client, steps in steps_by_client(passes).items()}


def own_batches(own: ClientTask, batches: EpochBatches) -> list[list[int]]:
    drawn = batches.of(own.samples, own.client, ROUND)
    return [batch.tolist() for batch in islice(drawn, own.num_steps)]


@pytest.mark.parametrize("num_lanes", [1, 3])
def test_a_lanes_row_holds_the_clients_next_batch(num_lanes: int) -> None:
    """The batches that `EpochBatches` gives, no matter whether the steps end within an epoch."""
    tasks = ragged_tasks() + [task(8 + number, 10, number) for number in range(1, 9)]
    found = batches_by_client(by_lanes(tasks, num_lanes))
    assert found == {own.client: own_batches(own, EPOCH_BATCHES) for own in tasks}


@pytest.mark.parametrize("num_lanes", [2, 3, 5, 8, 20])
def test_a_clients_steps_do_not_depend_on_the_lanes(num_lanes: int) -> None:
    one_lane = steps_by_client(by_lanes(ragged_tasks(), 1))
    assert steps_by_client(by_lanes(ragged_tasks(), num_lanes)) == one_lane
    assert steps_by_client(by_lanes(ragged_tasks()[::-1], num_lanes)) == one_lane


def test_a_clients_steps_do_not_depend_on_its_neighbours() -> None:
    together = steps_by_client(by_lanes(ragged_tasks(), 3))
    for own in ragged_tasks():
        assert steps_by_client(by_lanes([own], 3)) == {own.client: together[own.client]}


def test_steps_depend_on_seed_and_round() -> None:
    tasks = ragged_tasks()[3:4]
    variants = [steps_by_client(by_lanes(tasks, 1, seed, number))[3] for seed in (1, 2) for number in (0, 1)]
    orders = {str([batch for batch, _ in steps]) for steps in variants}
    keys = {key for steps in variants for _, found in steps for key in found}
    assert len(orders) == 4
    assert len(keys) == sum(len(steps) for steps in variants)


def test_every_client_and_step_has_a_key_of_its_own() -> None:
    steps = steps_by_client(by_lanes(ragged_tasks(), 3))
    keys = [key for own in steps.values() for _, (key,) in own]
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
    for current in by_lanes(tasks, num_lanes):
        seated |= {started.lane: started.task.client for started in current.starting}
        found.append(dict(seated))
        busy = current.mask.any(dim=1)
        assert busy.tolist() == [lane in seated for lane in range(num_lanes)]
        assert sorted(stepping.lane for stepping in current.stepping) == sorted(seated)
        for finished in current.finished:
            del seated[finished.lane]
    assert found == expected
    if num_lanes == 1:
        assert len(found) == sum(own.num_steps for own in tasks)


def test_shapes_stay_and_places_without_a_sample_are_masked() -> None:
    passes = by_lanes(ragged_tasks(), 3)
    for current in passes:
        assert current.indices.shape == current.mask.shape == (3, BATCH)
        assert current.lanes.shape == current.row_keys.shape == (3,)
        assert (current.indices.dtype, current.mask.dtype) == (torch.int64, torch.bool)
        assert (current.indices[~current.mask] == 0).all()
        assert (current.indices[current.mask] > 0).all()
        for row in current.mask.tolist():
            assert row == sorted(row, reverse=True)  # real samples come first
    assert not passes[-1].mask.all(dim=1).all()


def test_clients_without_steps_are_left_out() -> None:
    tasks = [task(0, 0, 0), epochs(1, 5, 1), task(2, 6, 0)]
    passes = by_lanes(tasks, 2)
    assert {started.task.client for current in passes for started in current.starting} == {1}
    assert {finished.task.client for current in passes for finished in current.finished} == {1}
    assert by_lanes([task(0, 0, 0)], 2) == []
    assert by_lanes([], 2) == []


def test_every_client_starts_and_finishes_once() -> None:
    passes = by_lanes(ragged_tasks(), 3)
    started = [own.task.client for current in passes for own in current.starting]
    finished = [own.task.client for current in passes for own in current.finished]
    assert started == list(range(8))
    assert sorted(finished) == started


@pytest.mark.parametrize(("lanes", "slots"), [(3, 12), (3, 5), (1, 1), (8, 64)])
def test_a_clients_random_batches_do_not_depend_on_lanes_slots_or_neighbours(lanes: int, slots: int) -> None:
    tasks = make_tasks((9, 3, 40, 1, 11, 7), (5, 2, 12, 5, 3, 1))
    passes = by_slots(tasks, lanes, slots)
    together = steps_by_client(passes)
    for own in tasks:
        assert steps_by_client(by_slots([own], 1, 3)) == {own.client: together[own.client]}
        assert batches_by_client(passes)[own.client] == own_batches(own, POISSON_BATCHES)
        assert len(together[own.client]) == own.num_steps
    assert all(current.indices.shape == current.mask.shape == (slots, 1) for current in passes)


def test_an_empty_batch_is_a_step_too() -> None:
    """With one sample in a hundred a step, most batches are empty."""
    tasks = make_tasks((100,), (60,))
    batches = batches_by_client(by_slots(tasks, 1, 4, PoissonBatches(1, SEED)))[0]
    assert len(batches) == 60
    assert [] in batches


def test_slots_are_kept_busy() -> None:
    """Draws of 16 on average, 64 slots for four clients: with 16 slots each, many steps would take two passes."""
    passes = by_slots(make_tasks([64] * 8, [40] * 8), 4, 64, PoissonBatches(16, SEED))
    used = sum(int(current.mask.sum()) for current in passes)
    assert used / (64 * len(passes)) > 0.85
