"""Batches under sample-level privacy: who is drawn, and that every draw is gone through exactly once."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch

from fedpeft_dist.training.lane_schedule import ClientTask
from fedpeft_dist.training.sample_schedule import BatchDraw, schedule_samples

SEED, ROUND = 3, 2


def make_tasks(sizes, steps):
    tasks, first = [], 0
    for client, (size, count) in enumerate(zip(sizes, steps)):
        tasks.append(ClientTask(client, torch.arange(first, first + size), count, size))
        first += size
    return tasks


def batches_of(passes, tasks):
    """{client: [the samples of each of its steps, in order]}; checks what each pass says of itself."""
    owner = {int(sample): task.client for task in tasks for sample in task.samples}
    seats, open_batches, done = {}, defaultdict(list), defaultdict(list)
    for current in passes:
        for lane, task in current.starting:
            assert lane not in seats
            seats[lane] = task
        for index, lane in zip(current.indices[current.mask].tolist(), current.lanes[current.mask].tolist()):
            assert owner[index] == seats[lane].client
            open_batches[lane].append(index)
        for lane, task, _ in current.stepping:
            assert seats[lane] is task
            done[task.client].append(open_batches.pop(lane, []))
        for lane, task in current.finished:
            assert seats.pop(lane) is task
    assert not seats
    assert not open_batches
    return done


@pytest.mark.parametrize(("lanes", "slots"), [(3, 12), (3, 5), (1, 1), (8, 64)])
def test_what_a_client_goes_through_depends_on_nobody_else(lanes, slots):
    tasks = make_tasks((9, 3, 40, 1, 11, 7), (5, 2, 12, 5, 3, 1))
    draw = BatchDraw(4)
    together = batches_of(schedule_samples(tasks, lanes, slots, draw, SEED, SEED, ROUND), tasks)
    for task in tasks:
        alone = batches_of(schedule_samples([task], 1, 3, draw, SEED, SEED, ROUND), [task])
        assert together[task.client] == alone[task.client]
        assert len(together[task.client]) == task.num_steps


def test_noise_keys_differ_between_clients_and_steps_and_do_not_depend_on_slots():
    tasks = make_tasks((9, 3, 6), (5, 2, 5))
    keys = []
    for lanes, slots in ((3, 12), (1, 2)):
        passes = schedule_samples(tasks, lanes, slots, BatchDraw(4), SEED, SEED, ROUND)
        keys.append(sorted((task.client, key) for current in passes for _, task, key in current.stepping))
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == 12


def test_another_noise_seed_draws_and_adds_otherwise():
    tasks = make_tasks((40, 40), (5, 5))
    found = []
    for noise_seed in (SEED, SEED + 1):
        passes = list(schedule_samples(tasks, 2, 8, BatchDraw(4), SEED, noise_seed, ROUND))
        keys = {key for current in passes for _, _, key in current.stepping}
        found.append((batches_of(passes, tasks), keys))
    assert found[0][0] != found[1][0]
    assert not found[0][1] & found[1][1]


def test_empty_batches_are_steps_too():
    """One sample in a hundred a step: most batches are empty."""
    tasks = make_tasks((100,), (60,))
    batches = batches_of(schedule_samples(tasks, 1, 4, BatchDraw(1), SEED, SEED, ROUND), tasks)[0]
    assert len(batches) == 60
    assert [] in batches


def test_slots_are_kept_busy():
    """Draws of 16 on average, 64 slots for four clients: with 16 slots each, many steps would take two passes."""
    tasks = make_tasks([64] * 8, [40] * 8)
    passes = list(schedule_samples(tasks, 4, 64, BatchDraw(16), SEED, SEED, ROUND))
    used = sum(int(current.mask.sum()) for current in passes)
    assert used / (64 * len(passes)) > 0.85


def test_every_sample_is_drawn_with_its_probability_by_itself():
    size, batch, steps = 50, 10, 4000
    tasks = make_tasks((size,), (steps,))
    batches = batches_of(schedule_samples(tasks, 1, 64, BatchDraw(batch), SEED, SEED, ROUND), tasks)[0]
    drawn = torch.zeros(steps, size)
    for step, batch_samples in enumerate(batches):
        drawn[step, batch_samples] = 1
    q = batch / size
    error = math.sqrt(q * (1 - q) / steps)
    assert (drawn.mean(dim=0) - q).abs().max() < 5 * error
    sizes = drawn.sum(dim=1)
    assert abs(sizes.mean() - batch) < 5 * math.sqrt(size * q * (1 - q) / steps)
    assert abs(sizes.var() / (size * q * (1 - q)) - 1) < 5 * math.sqrt(2 / steps), "binomial, so not of a fixed size"
    correlations = torch.corrcoef(drawn.T)[~torch.eye(size, dtype=torch.bool)]
    assert correlations.abs().max() < 6 / math.sqrt(steps)


def test_a_client_smaller_than_a_batch_goes_through_all_it_has():
    tasks = make_tasks((3,), (4,))
    assert batches_of(schedule_samples(tasks, 1, 8, BatchDraw(8), SEED, SEED, ROUND), tasks)[0] == [[0, 1, 2]] * 4
    assert BatchDraw(8).expected(3) == 3
    assert BatchDraw(8).expected(30) == 8


def test_truncation_keeps_a_random_subset():
    draw = BatchDraw(20, max_batch=5)
    assert draw.expected(100) == 5
    counts = torch.zeros(100)
    for key in range(4000):
        batch = draw(torch.arange(100), key)
        assert len(batch) <= 5
        assert len(set(batch.tolist())) == len(batch)
        counts[batch] += 1
    share = counts / counts.sum()
    assert (share - 0.01).abs().max() < 6 * math.sqrt(0.01 / counts.sum())


def test_secure_draws_differ_each_time():
    draw = BatchDraw(50, secure=True)
    first, second = (draw(torch.arange(1000), 1) for _ in range(2))
    assert first.tolist() != second.tolist()
    assert 10 < len(first) < 110
