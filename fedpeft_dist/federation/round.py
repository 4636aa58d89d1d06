"""One round: plan who takes part, train them, aggregate, step, evaluate."""

import time
from dataclasses import dataclass, replace

import torch

from fedpeft_dist.algorithms.state import State, with_rows
from fedpeft_dist.federation.aggregation import Aggregation, RoundTotal
from fedpeft_dist.federation.assignment import assign
from fedpeft_dist.federation.simulation import Simulation
from fedpeft_dist.federation.watch import Watch
from fedpeft_dist.participation.plan import RoundPlan
from fedpeft_dist.privacy.user_level import NoisyMean
from fedpeft_dist.runtime.collectives import any_rank, sum_over_ranks
from fedpeft_dist.runtime.interrupts import StoppedEarlyError
from fedpeft_dist.tracking.run_log import RoundRecord, add_round


@dataclass(frozen=True)
class RoundResult:
    """The same on every rank."""

    state: State
    """After the round."""
    record: RoundRecord
    is_last: bool
    """Some rank was asked to stop."""


def run_round(state: State, simulation: Simulation, watch: Watch) -> RoundResult | None:
    """Runs the round that follows a state. Every rank must call it.

    Returns:
        None if the round is dropped, because it would last too long after a request to stop: `state` still holds.
    """
    started = time.perf_counter()
    setup, runtime, federation = simulation.setup, simulation.runtime, simulation.config.federation
    plan = simulation.participation.plan(state.round)
    tasks = setup.tasks(assign(plan.steps, runtime.num_trainers)[runtime.trainer], plan.steps)
    aggregation = simulation.aggregation(state)
    for update in simulation.trainer.train(tasks, simulation.start(aggregation), watch.is_overdue):
        if runtime.counts:
            aggregation.add(update)
    rejected = aggregation.rejected_clients()
    total, stop, drop, padding = _sum(aggregation, state.round, watch, simulation)
    if drop:
        return None
    after, is_step = _step(aggregation, total, plan, simulation)
    trained = time.perf_counter()
    is_evaluated = is_due(after.round, federation.evaluate_every, simulation.num_rounds)
    try:
        evaluation = setup.evaluate(after.vector, watch.is_overdue) if is_evaluated else {}
    except StoppedEarlyError:
        return None
    _tell(state.round, rejected, plan, is_step, runtime.is_main)
    record = RoundRecord(
        round=after.round,
        train_loss=total.train_loss,
        cohort=plan.cohort,
        rejected=total.num_rejected,
        samples=total.num_samples,
        uplink_bytes=simulation.traffic.uplink * plan.cohort,
        downlink_bytes=simulation.traffic.downlink * plan.selected,
        seconds=trained - started,
        evaluate_seconds=time.perf_counter() - trained,
        evaluation=evaluation,
        participation={} if federation.participation.is_ideal else plan.figures(),
        spending=simulation.spending(state, after if is_evaluated else None),
        padding={} if runtime.mesh is None else padding | {"padded_batches": setup.padded_batches * is_evaluated},
    )
    # A rank that was asked during the evaluation begins no other round.
    is_last = stop or (is_evaluated and any_rank(watch.stop.received, runtime))
    return RoundResult(replace(after, totals=add_round(state.totals, record)), record, is_last)


def is_due(rounds_done: int, every: int, num_rounds: int) -> bool:
    """Whether to do now what is done every so many rounds (0: at the end only)."""
    return rounds_done == num_rounds or (every > 0 and rounds_done % every == 0)


def _sum(
    aggregation: Aggregation, round_number: int, watch: Watch, simulation: Simulation
) -> tuple[RoundTotal, bool, bool, dict[str, int]]:
    """The round's one all-reduce.

    Two flags travel beside the sums: whether to stop, and whether to drop the round. So do the numbers of passes, and
    of empty ones among them.
    """
    runtime, trainer = simulation.runtime, simulation.trainer
    if runtime.is_main:
        aggregation.add_noise(round_number)
    own = [*watch.flags(), trainer.num_passes, trainer.num_padded]
    own = torch.tensor(own, dtype=torch.int64, device=runtime.device)
    sums = sum_over_ranks(torch.cat([aggregation.sums, own]), runtime)
    stop, drop, passes, padded = sums[-len(own) :].tolist()
    padding = {"passes": passes, "padded_passes": padded}
    return aggregation.total(sums[: -len(own)]), stop > 0, drop > 0, padding


def _step(aggregation: Aggregation, total: RoundTotal, plan: RoundPlan, simulation: Simulation) -> tuple[State, bool]:
    """The state after the round, and whether its vector has moved."""
    state, algorithm, cohort = aggregation.state, simulation.algorithm, list(plan.steps)
    combined = aggregation.combined(total, cohort, simulation.runtime)
    after = replace(state, round=state.round + 1)
    if combined is not None:
        after = algorithm.step(after, combined, len(cohort) - total.num_rejected)
    if algorithm.row_size and cohort:
        rows = aggregation.gathered_rows(cohort, simulation.runtime)
        after = replace(after, clients=with_rows(state.clients, cohort, rows))
    if isinstance(aggregation.rule, NoisyMean):
        clip_norm = torch.tensor(aggregation.rule.next_clip_norm(total.extra), dtype=torch.float64)
        after = replace(after, algorithm={**after.algorithm, "clip_norm": clip_norm})
    return after, combined is not None


def _tell(round_number: int, rejected: list[int], plan: RoundPlan, is_step: bool, is_main: bool) -> None:
    for client in rejected:
        print(f"round {round_number + 1}: client {client} is rejected, its delta is not finite or too large")
    if not plan.steps and is_main:
        what = "its step is noise alone" if is_step else "the round is skipped"
        print(f"round {round_number + 1}: no client's update arrives ({plan.selected} selected), {what}")
