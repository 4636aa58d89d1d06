"""Exact aggregation: deltas are summed as 64-bit integers, so neither order nor the number of ranks can matter.

    q = round_half_even(float64(delta) * 2^s),    s = 62 - 10 - ceil(log2 W)

W bounds the sum of a round's weights, which are integers, and |delta| < 1024 = 2^10: no sum leaves the int64 range.
The cost is a rounding of each delta to 2^-s, far below float32's own for any delta that is not tiny.

Shapes: M cohort, V numbers that a client sends, S numbers that a client keeps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from fedpeft_dist.algorithms.algorithm import Algorithm
from fedpeft_dist.algorithms.state import State
from fedpeft_dist.data.store import send
from fedpeft_dist.runtime.collectives import gather_rows
from fedpeft_dist.runtime.process import Runtime
from fedpeft_dist.training.trainer import ClientUpdate

DELTA_LIMIT = 1024.0
"""A client that sends an element of this size, or one that is not finite, is rejected."""
_RANGE_BITS = 62
_LIMIT_BITS = 10
_WEIGHT, _REJECTED, _LOSS, _SAMPLES, _EXTRA, TAIL = range(6)
"""Places of the numbers that are summed beside the vectors; TAIL is how many these are."""


class MeanRule(Protocol):
    """How vectors become integers, and their sum a mean again."""

    counts_alike: bool
    """Whether each client has weight 1, whatever the algorithm says."""

    def to_integers(self, sent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | int]:
        """A vector [V] as int64 [V], for each unit of its weight, and an integer to sum beside it."""

    def add_noise(self, total: torch.Tensor, extra: torch.Tensor, round_number: int) -> None:
        """Changes the sums of one rank in place: int64 [V], and the sum of the integers beside them, int64 [1]."""

    def mean(self, total: torch.Tensor, weight: int) -> torch.Tensor | None:
        """The mean, float32 [V]; None if there is none."""


@dataclass(frozen=True)
class WeightedMean:
    """The mean of what accepted clients send, by their weights."""

    bits: int
    """s."""
    counts_alike: ClassVar[bool] = False

    def to_integers(self, sent: torch.Tensor) -> tuple[torch.Tensor, int]:
        return quantize(sent, self.bits), 0

    def add_noise(self, total: torch.Tensor, extra: torch.Tensor, round_number: int) -> None:
        """There is none."""

    def mean(self, total: torch.Tensor, weight: int) -> torch.Tensor | None:
        return (total.double() / (weight * 2.0**self.bits)).float() if weight else None


@dataclass(frozen=True)
class RoundTotal:
    """What a round's all-reduce brings, the same on every rank."""

    mean: torch.Tensor | None
    """Mean of the accepted vectors, float32 [V]. None without any weight, and for an algorithm that gathers."""
    num_rejected: int
    train_loss: float | None
    """Weighted mean over the accepted clients; None without any."""
    num_samples: int
    """Training samples processed, repetitions counted."""
    extra: int
    """The sum of the rule's own integers."""


def fraction_bits(largest_total_weight: int) -> int:
    """s, for rounds whose weights sum to at most W = largest_total_weight."""
    return _RANGE_BITS - _LIMIT_BITS - (max(largest_total_weight, 1) - 1).bit_length()


def quantize(values: torch.Tensor, bits: int) -> torch.Tensor:
    """round_half_even(values * 2^bits), computed in float64: int64 of the same shape."""
    return torch.round(values.double() * 2.0**bits).to(torch.int64)


class Aggregation:
    """Takes in this rank's updates of one round. `sums` of all ranks add up to the round's.

    Args:
        state: before the round.
        lr_factor: of the round.
        largest_total_weight: W.
        rule: how vectors become a mean.
    """

    def __init__(self, algorithm: Algorithm, state: State, lr_factor: float, largest_total_weight: int, rule: MeanRule):
        self.algorithm, self.state, self.lr_factor, self.rule = algorithm, state, lr_factor, rule
        self.loss_bits = fraction_bits(largest_total_weight)
        size, device = len(state.vector), state.vector.device
        self.num_summed = 0 if algorithm.gathers else algorithm.config.vectors_sent * size
        self.sums = torch.zeros(self.num_summed + TAIL, dtype=torch.int64, device=device)
        self.accepted: dict[int, torch.Tensor] = {}
        self.sent: dict[int, torch.Tensor] = {}
        self.rows: dict[int, torch.Tensor] = {}
        self.no_row = torch.zeros(algorithm.row_size * size)

    def row(self, client: int) -> torch.Tensor:
        """What a client has kept: float32 [S], on the device."""
        return send(self.state.clients.get(client, self.no_row), self.sums.device)

    def offset(self, client: int) -> torch.Tensor | None:
        return self.algorithm.offset(self.row(client), self.state)

    def add(self, update: ClientUpdate) -> None:
        """Takes in an update, or counts it as rejected; decided on the device, without waiting for it."""
        row = self.row(update.client)
        sent = self.algorithm.send(update, row, self.state, self.lr_factor)
        accepted = (sent.abs() < DELTA_LIMIT).all()
        weight = accepted.long() * (1 if self.rule.counts_alike else self.algorithm.weight(update))
        tail = self.sums[-TAIL:]
        if self.algorithm.gathers:
            self.sent[update.client] = torch.where(accepted, sent, torch.nan)
        else:
            integers, extra = self.rule.to_integers(sent)
            self.sums[:-TAIL] += torch.where(accepted, integers, 0) * weight
            tail[_EXTRA] += extra * accepted.long()
        if self.algorithm.row_size:
            self.rows[update.client] = torch.where(accepted, self.algorithm.next_row(update, row, sent), row)
        loss = torch.nan_to_num(update.loss, nan=DELTA_LIMIT).clamp(-DELTA_LIMIT, DELTA_LIMIT)
        tail[_WEIGHT] += weight
        tail[_REJECTED] += 1 - accepted.long()
        tail[_LOSS] += quantize(loss, self.loss_bits) * weight
        tail[_SAMPLES] += update.num_samples
        self.accepted[update.client] = accepted

    def add_noise(self, round_number: int) -> None:
        """Adds the rule's noise to the sums; on one rank alone."""
        tail = self.sums[-TAIL:]
        self.rule.add_noise(self.sums[:-TAIL], tail[_EXTRA : _EXTRA + 1], round_number)

    def rejected_clients(self) -> list[int]:
        """This rank's clients that were rejected."""
        if not self.accepted:
            return []
        flags = torch.stack(list(self.accepted.values())).tolist()
        return [client for client, accepted in zip(self.accepted, flags) if not accepted]

    def total(self, sums: torch.Tensor) -> RoundTotal:
        """Reads the sums over all ranks."""
        weight, rejected, loss, samples, extra = sums[-TAIL:].tolist()
        return RoundTotal(
            mean=None if self.algorithm.gathers else self.rule.mean(sums[:-TAIL], weight),
            num_rejected=rejected,
            train_loss=loss / (weight * 2.0**self.loss_bits) if weight else None,
            num_samples=samples,
            extra=extra,
        )

    def combined(self, total: RoundTotal, cohort: Sequence[int], runtime: Runtime) -> torch.Tensor | None:
        """What the algorithm steps on, float32 [V]; None if no client was accepted. Every rank must call it."""
        if not self.algorithm.gathers:
            return total.mean
        size = self.algorithm.config.vectors_sent * len(self.state.vector)
        sent = gather_rows(self.sent, cohort, size, runtime)
        sent = sent[sent.isfinite().all(dim=1)]
        return self.algorithm.combine(sent) if len(sent) else None

    def gathered_rows(self, cohort: Sequence[int], runtime: Runtime) -> torch.Tensor:
        """What the cohort's clients keep from now on: float32 [M, S]. Every rank must call it."""
        return gather_rows(self.rows, cohort, len(self.no_row), runtime)
