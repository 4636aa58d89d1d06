"""Which rank trains which client of the cohort."""

import heapq
from collections.abc import Mapping


def assign(steps: Mapping[int, int], num_ranks: int) -> list[list[int]]:
    """Longest first onto the least loaded rank (Graham 1969).

    Args:
        steps: the local steps of each client of the cohort.

    Returns:
        Each rank's clients, the long ones first, so that no lane is left alone with one at the end of the round.
    """
    shards: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for client in sorted(steps, key=lambda client: (-steps[client], client)):
        load, rank = heapq.heappop(loads)
        shards[rank].append(client)
        heapq.heappush(loads, (load + steps[client], rank))
    return shards
