"""How evenly a run's work is spread over ranks, from its partition and its plans of rounds. Nothing is trained.

Passes have fixed shapes, so all take the same time. A round lasts as long as the rank with the most passes. Where
`privacy.slots` is below L times the batch, a step takes several passes; they are counted as one.

Shapes: L lanes, M cohort.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.federation.assignment import assign
from fedpeft_dist.participation.plan import Participation

MOST_CLIENTS = 100_000
"""Clients of all planned rounds together. Planning them takes about a second."""


@dataclass(frozen=True)
class Balance:
    """Means over the rounds that were planned. A pass is one forward and backward pass of all lanes of a rank."""

    rounds: int
    """Rounds that were planned, from the first one on."""
    passes: float
    """Passes of a rank in a round."""
    longest: float
    """Passes of the rank with the most, which the others wait for."""
    idle_share: float
    """Share of a round in which a rank waits for the one with the most passes, or makes empty passes."""
    empty_lanes: float
    """Share of the places of lanes, in the passes of ranks, that no client has."""
    padded_share: float
    """Share of a rank's passes that are empty, because a group that shares weights makes as many on every rank."""


def balance_of(config: RunConfig, participation: Participation, num_ranks: int, num_lanes: int) -> Balance:
    """
    Args:
        num_ranks: all ranks of the run.
        num_lanes: L, of each rank, or of each group that shares its lanes.
    """
    sharding = config.runtime.sharding
    trainers = num_ranks // sharding.size if sharding.lanes == "shared" else num_ranks
    group = 1 if sharding.lanes == "shared" else sharding.size
    rounds = max(1, min(config.federation.rounds, MOST_CLIENTS // max(participation.cohort, 1)))
    total = longest = made = steps_done = 0
    for number in range(rounds):
        steps = participation.plan(number).steps
        passes = [count_passes(own, steps, num_lanes) for own in assign(steps, trainers)]
        total += sum(passes)
        longest += max(passes)
        made += sum(group * max(passes[start : start + group]) for start in range(0, trainers, group))
        steps_done += sum(steps.values())
    whole = trainers * longest
    return Balance(
        rounds=rounds,
        passes=total / trainers / rounds,
        longest=longest / rounds,
        idle_share=1 - total / whole if whole else 0.0,
        empty_lanes=1 - steps_done / (num_lanes * total) if total else 0.0,
        padded_share=1 - total / made if made else 0.0,
    )


def count_passes(clients: Sequence[int], steps: Mapping[int, int], num_lanes: int) -> int:
    """The passes in which L lanes train a rank's clients: a lane that is done takes the next client at once.

    Args:
        clients: in the order in which they are taken.
        steps: the local steps of each.
    """
    ends = [0] * num_lanes
    for client in clients:
        heapq.heapreplace(ends, ends[0] + steps[client])
    return max(ends)
