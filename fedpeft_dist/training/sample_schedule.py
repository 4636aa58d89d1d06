"""Which samples are gone through together under sample-level privacy, and when clients step. Runs on the host alone.

A client's local step draws its batch at random, every sample by itself, so batches differ in size. Clients sit in L
lanes as they do without privacy; their samples share R slots, each with a gradient of its own. A pass fills the slots
with what the lanes' batches still lack, so a batch may need several passes and slots stay busy all the same. A client
steps once its batch is through, also when the batch is empty.

Shapes: L lanes, R slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from fedpeft_dist.lanes.random import derive_seed, fold_in, permutation, random_bits, unit_interval
from fedpeft_dist.privacy.mechanisms import secure_bits
from fedpeft_dist.training.lane_schedule import ClientTask


@dataclass(frozen=True)
class BatchDraw:
    """How a local step draws its samples: each with probability q = min(1, batch_size / n).

    Args:
        max_batch: keep a random subset of that size of a larger batch.
        secure: draw from the operating system's randomness.
    """

    batch_size: int
    max_batch: int | None = None
    secure: bool = False

    def expected(self, num_samples: int) -> float:
        """The number to expect of a client with n samples; what a sum of gradients is divided by."""
        expected = min(self.batch_size, num_samples)
        return expected if self.max_batch is None else min(expected, self.max_batch)

    def __call__(self, samples: torch.Tensor, key: int) -> torch.Tensor:
        """Of a client's samples, int64 [n], those of one step, in their order."""
        probability = min(1.0, self.batch_size / len(samples))
        draws = self._uniform(len(samples), key)
        chosen = samples[draws < probability]
        if self.max_batch is None or len(chosen) <= self.max_batch:
            return chosen
        order = permutation(self._subset_key(key), len(chosen))
        return chosen[order[: self.max_batch].sort().values]

    def _uniform(self, size: int, key: int) -> torch.Tensor:
        if self.secure:
            return unit_interval(secure_bits((size,)))
        return unit_interval(random_bits(fold_in(torch.tensor(key), torch.arange(size))))

    def _subset_key(self, key: int) -> int:
        return int(secure_bits((1,))) if self.secure else derive_seed(key, "subset")


@dataclass
class Pass:
    """One forward and backward pass over R slots."""

    indices: torch.Tensor
    """int64 [R]; 0 where idle."""
    mask: torch.Tensor
    """bool [R]: holds a sample."""
    lanes: torch.Tensor
    """int64 [R]: whose sample it is; 0 where idle."""
    step_keys: torch.Tensor
    """int64 [R]: a key for the client and its step."""
    starting: list[tuple[int, ClientTask]] = field(default_factory=list)
    """(lane, client) to load before the pass."""
    stepping: list[tuple[int, ClientTask, int]] = field(default_factory=list)
    """(lane, client, key of its noise) to step after the pass."""
    finished: list[tuple[int, ClientTask]] = field(default_factory=list)
    """(lane, client) to collect after that."""


class _Seat:
    """A client in a lane: how many steps it has taken, and what is left of the batch of the next one."""

    def __init__(self, task: ClientTask, draw: BatchDraw, seed: int, noise_seed: int, round_number: int):
        self.task, self.draw = task, draw
        self.key = derive_seed(seed, "client", round_number, task.client)
        self.secret = derive_seed(noise_seed, "client", round_number, task.client)
        self.step = 0
        self.pending = self._next_batch()

    def _next_batch(self) -> torch.Tensor:
        return self.draw(self.task.samples, derive_seed(self.secret, "draw", self.step))

    def take(self, most: int) -> torch.Tensor:
        """Up to so many of the samples that the batch still lacks."""
        taken, self.pending = self.pending[:most], self.pending[most:]
        return taken

    def end_step(self) -> None:
        self.step += 1
        if self.step < self.task.num_steps:
            self.pending = self._next_batch()


def schedule_samples(
    tasks: Iterable[ClientTask],
    num_lanes: int,
    num_slots: int,
    draw: BatchDraw,
    seed: int,
    noise_seed: int,
    round_number: int,
) -> Iterator[Pass]:
    """The passes that train all clients that have steps to do.

    A client's batches and noise depend on (noise_seed, round, client, step) alone, not on lane, slot or neighbours.
    """
    waiting = deque(task for task in tasks if task.num_steps)
    seats: list[_Seat | None] = [None] * num_lanes
    while waiting or any(seats):
        result = Pass(
            indices=torch.zeros(num_slots, dtype=torch.int64),
            mask=torch.zeros(num_slots, dtype=torch.bool),
            lanes=torch.zeros(num_slots, dtype=torch.int64),
            step_keys=torch.zeros(num_slots, dtype=torch.int64),
        )
        for lane in range(num_lanes):
            if seats[lane] is None and waiting:
                task = waiting.popleft()
                seats[lane] = _Seat(task, draw, seed, noise_seed, round_number)
                result.starting.append((lane, task))
        filled = 0
        # Who has most steps before it goes first: it would else be the one that all slots wait for in the end.
        for lane in sorted(range(num_lanes), key=lambda lane: _steps_left(seats[lane]), reverse=True):
            seat = seats[lane]
            if seat is None:
                continue
            taken = seat.take(num_slots - filled)
            slots = slice(filled, filled + len(taken))
            result.indices[slots], result.mask[slots], result.lanes[slots] = taken, True, lane
            result.step_keys[slots] = derive_seed(seat.key, "step", seat.step)
            filled += len(taken)
            if len(seat.pending):
                continue
            result.stepping.append((lane, seat.task, derive_seed(seat.secret, "noise", seat.step)))
            seat.end_step()
            if seat.step == seat.task.num_steps:
                result.finished.append((lane, seat.task))
                seats[lane] = None
        yield result


def _steps_left(seat: _Seat | None) -> int:
    return 0 if seat is None else seat.task.num_steps - seat.step
