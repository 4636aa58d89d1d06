"""Which client sits in which lane, and which samples share a pass. Runs on the host alone.

A lane whose client is done takes the next waiting client at once, so lanes stay busy while clients differ in size.
A pass goes forward and backward over R rows of B samples. Shapes never change: short batches and idle rows are masked.

Without per-sample gradients, row l belongs to lane l and holds its whole batch. With them, a row holds one sample, and
the rows are filled from all lanes in turn: a batch may need several passes, and its client steps after the last one.

Shapes: L lanes, R rows, B batch.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import nn

from fedpeft_dist.lanes.random import derive_seed
from fedpeft_dist.training.batches import EpochBatches


@dataclass(frozen=True)
class ClientTask:
    """One client's work in one round."""

    client: int
    samples: torch.Tensor
    """int64 [n], indices into the training set."""
    num_steps: int
    weight: int
    """The client's number of samples: its weight in the mean."""


class Seated(NamedTuple):
    """A client in a lane."""

    lane: int
    task: ClientTask
    step: int
    """Local steps done before this pass."""
    num_samples: int
    """Samples gone through in this round, repetitions counted."""


@dataclass
class Pass:
    """One forward and backward pass."""

    indices: torch.Tensor
    """int64 [R, B]; 0 in masked places."""
    mask: torch.Tensor
    """bool [R, B]: the places that hold a sample."""
    lanes: torch.Tensor
    """int64 [R]: the lane that each row belongs to."""
    row_keys: torch.Tensor
    """int64 [R]: a key for each row's client and step."""
    starting: list[Seated] = field(default_factory=list)
    """Clients to load before the pass."""
    stepping: list[Seated] = field(default_factory=list)
    """Clients whose batch is complete: they step after the pass."""
    finished: list[Seated] = field(default_factory=list)
    """Clients to collect after the step."""

    @cached_property
    def sizes(self) -> torch.Tensor:
        """The number of samples in each row: int64 [R]."""
        return self.mask.sum(dim=1)

    def part(self, place: int, num_parts: int) -> "Pass":
        """One of so many parts of the columns, all of one width: what one rank of a group computes."""
        width = -(-self.mask.shape[1] // num_parts)
        padding, columns = (0, width * num_parts - self.mask.shape[1]), slice(place * width, (place + 1) * width)
        indices, mask = (nn.functional.pad(tensor, padding)[:, columns] for tensor in (self.indices, self.mask))
        return replace(self, indices=indices, mask=mask)


class _Seat:
    """A client in a lane, with the samples that its current batch still lacks."""

    def __init__(self, task: ClientTask, schedule: "Schedule", round_number: int):
        self.task, self.step, self.num_samples = task, 0, 0
        self.key = derive_seed(schedule.seed, "client", round_number, task.client)
        self.batches = schedule.batches.of(task.samples, task.client, round_number)
        self.pending = next(self.batches)

    @property
    def steps_left(self) -> int:
        return self.task.num_steps - self.step

    def take(self, most: int) -> torch.Tensor:
        """Up to `most` of the samples that the batch still lacks."""
        taken, self.pending = self.pending[:most], self.pending[most:]
        self.num_samples += len(taken)
        return taken

    def end_step(self) -> None:
        self.step += 1
        if self.steps_left:
            self.pending = next(self.batches)

    def seated(self, lane: int) -> Seated:
        return Seated(lane, self.task, self.step, self.num_samples)


@dataclass(frozen=True)
class Schedule:
    """
    Args:
        num_lanes: L.
        batches: how clients draw their batches.
        seed: the run's, for the keys of the rows.
        num_slots: the number of rows with one sample each; None gives each lane a row for its whole batch.
    """

    num_lanes: int
    batches: EpochBatches
    seed: int
    num_slots: int | None = None

    def passes(self, tasks: Iterable[ClientTask], round_number: int) -> Iterator[Pass]:
        """The passes that train all clients that have local steps to do, in the order given.

        A client's batches and keys do not depend on its lane, its rows or its neighbours.
        """
        waiting = deque(task for task in tasks if task.num_steps)
        seats: list[_Seat | None] = [None] * self.num_lanes
        while waiting or any(seats):
            current = self.empty_pass()
            for lane in range(self.num_lanes):
                if seats[lane] is None and waiting:
                    seats[lane] = _Seat(waiting.popleft(), self, round_number)
                    current.starting.append(seats[lane].seated(lane))
            self._fill(current, seats)
            yield current

    def _fill(self, current: Pass, seats: list[_Seat | None]) -> None:
        """Lays samples into rows. The client with most steps to do goes first, or all would wait for it in the end."""
        indices, mask, width = current.indices.view(-1), current.mask.view(-1), current.mask.shape[1]
        filled = 0
        busy = [(lane, seat) for lane, seat in enumerate(seats) if seat is not None]
        for lane, seat in sorted(busy, key=lambda own: -own[1].steps_left):
            start, room = (lane * width, width) if self.num_slots is None else (filled, len(mask) - filled)
            taken = seat.take(room)
            places = slice(start, start + len(taken))
            rows = slice(start // width, -(-places.stop // width))
            indices[places], mask[places] = taken, True
            current.lanes[rows] = lane
            current.row_keys[rows] = derive_seed(seat.key, "step", seat.step)
            filled += len(taken)
            if len(seat.pending):
                continue
            current.stepping.append(seat.seated(lane))
            seat.end_step()
            if not seat.steps_left:
                current.finished.append(seat.seated(lane))
                seats[lane] = None

    def empty_pass(self) -> Pass:
        """A pass without samples."""
        by_lane = self.num_slots is None
        rows, width = (self.num_lanes, self.batches.batch_size) if by_lane else (self.num_slots, 1)
        return Pass(
            indices=torch.zeros(rows, width, dtype=torch.int64),
            mask=torch.zeros(rows, width, dtype=torch.bool),
            lanes=torch.zeros(rows, dtype=torch.int64),
            row_keys=torch.zeros(rows, dtype=torch.int64),
        )
