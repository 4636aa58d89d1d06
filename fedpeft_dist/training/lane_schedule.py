"""Which client sits in which lane at every local step, and which of its samples come next. Runs on the host alone.

A lane whose client is done takes the next waiting client at once, so lanes stay busy while clients differ in size. All
shapes stay [L, B]: a short batch and an idle lane are masked.

Shapes: L lanes, B batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count

import torch

from fedpeft_dist.lanes.random import derive_seed, permutation


@dataclass(frozen=True)
class ClientTask:
    """One client's work in one round."""

    client: int
    samples: torch.Tensor
    """int64 [n], indices into the training set."""
    num_steps: int
    weight: int
    """In the aggregation: its number of samples."""


@dataclass
class Tick:
    """One local step of all lanes."""

    indices: torch.Tensor
    """int64 [L, B]; 0 where masked."""
    mask: torch.Tensor
    """bool [L, B]: real samples."""
    lane_keys: torch.Tensor
    """int64 [L]: a key for each lane's client and step."""
    starting: list[tuple[int, ClientTask]] = field(default_factory=list)
    """(lane, client) to load before the step."""
    finished: list[tuple[int, ClientTask]] = field(default_factory=list)
    """(lane, client) to collect after it."""


class _Seat:
    """A client in a lane: its batches and how many steps it has taken."""

    def __init__(self, task: ClientTask, batch_size: int, seed: int, round_number: int):
        self.task = task
        self.step = 0
        self.key = derive_seed(seed, "client", round_number, task.client)
        self.batches = self._batches(batch_size, seed, round_number)

    def _batches(self, batch_size: int, seed: int, round_number: int) -> Iterator[torch.Tensor]:
        for epoch in count():
            key = derive_seed(seed, "order", round_number, self.task.client, epoch)
            order = self.task.samples[permutation(key, len(self.task.samples))]
            yield from order.split(batch_size)


def schedule_lanes(
    tasks: Iterable[ClientTask], num_lanes: int, batch_size: int, seed: int, round_number: int
) -> Iterator[Tick]:
    """The ticks that train all clients that have steps to do, in the order given.

    A client's batches depend on (seed, round, client) alone, not on its lane or on when it starts.
    """
    waiting = deque(task for task in tasks if task.num_steps)
    seats: list[_Seat | None] = [None] * num_lanes
    while waiting or any(seats):
        tick = Tick(
            indices=torch.zeros(num_lanes, batch_size, dtype=torch.int64),
            mask=torch.zeros(num_lanes, batch_size, dtype=torch.bool),
            lane_keys=torch.zeros(num_lanes, dtype=torch.int64),
        )
        for lane in range(num_lanes):
            if seats[lane] is None and waiting:
                task = waiting.popleft()
                seats[lane] = _Seat(task, batch_size, seed, round_number)
                tick.starting.append((lane, task))
            seat = seats[lane]
            if seat is None:
                continue
            batch = next(seat.batches)
            tick.indices[lane, : len(batch)] = batch
            tick.mask[lane, : len(batch)] = True
            tick.lane_keys[lane] = derive_seed(seat.key, "step", seat.step)
            seat.step += 1
            if seat.step == seat.task.num_steps:
                tick.finished.append((lane, seat.task))
                seats[lane] = None
        yield tick
