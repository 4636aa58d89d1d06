"""Which rank trains which client of the cohort."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from fedpeft_dist.training.lane_schedule import ClientTask


def assign(tasks: Sequence[ClientTask], num_ranks: int) -> list[list[ClientTask]]:
    """Longest first onto the least loaded rank (Graham 1969), by local steps; a shard keeps that order.

    Within a rank, too, the long clients start first, so that no lane is left alone with one at the end of the round.
    """
    shards: list[list[ClientTask]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for task in sorted(tasks, key=lambda task: (-task.num_steps, task.client)):
        load, rank = heapq.heappop(loads)
        shards[rank].append(task)
        heapq.heappush(loads, (load + task.num_steps, rank))
    return shards
