"""Exact aggregation: deltas are summed as 64-bit integers, so neither order nor the number of ranks can matter.

    q = round_half_even(float64(delta) * 2^s),    s = 62 - 10 - ceil(log2 W)

W bounds the sum of a round's weights, which are integers, and |delta| < 1024 = 2^10: no sum leaves the int64 range.
The cost is a rounding of each delta to 2^-s, far below float32's own for any delta that is not tiny.

Shapes: P trainable parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedpeft_dist.runtime.collectives import sum_over_ranks
from fedpeft_dist.runtime.process import Runtime
from fedpeft_dist.training.local_training import ClientUpdate

DELTA_LIMIT = 1024.0
"""A client with an element of this size, or one that is not finite, is rejected."""
_RANGE_BITS = 62
_LIMIT_BITS = 10
# The tail of the wire vector: what is summed beside the deltas.
_WEIGHT, _REJECTED, _LOSS, _SAMPLES, UNCLIPPED, _STOP, _DROP, TAIL = range(8)  # TAIL is their number


@dataclass(frozen=True)
class RoundTotal:
    """What a round's all-reduce brings, the same on every rank."""

    mean_delta: torch.Tensor | None
    """Weighted mean of the accepted deltas, float32 [P]; None where no client with any weight was accepted."""
    num_rejected: int
    train_loss: float | None
    """Weighted mean over the accepted clients; None where there is none."""
    num_samples: int
    """Training samples processed, repetitions counted."""
    stop_requested: bool
    """Some rank was asked to stop."""
    is_dropped: bool
    """Some rank has not trained its whole share: the rest says nothing, and the round is as if it had never begun."""


def fraction_bits(largest_total_weight: int) -> int:
    """s, for rounds whose weights sum to at most W = largest_total_weight."""
    return _RANGE_BITS - _LIMIT_BITS - (max(largest_total_weight, 1) - 1).bit_length()


def quantize(values: torch.Tensor, bits: int) -> torch.Tensor:
    """round_half_even(values * 2^bits), computed in float64: int64 of the same shape."""
    return torch.round(values.double() * 2.0**bits).to(torch.int64)


class Aggregator:
    """Takes this rank's updates one by one, then sums over ranks in one collective of P + a few int64."""

    def __init__(self, num_parameters: int, largest_total_weight: int, runtime: Runtime):
        self.runtime = runtime
        self.total = torch.zeros(num_parameters + TAIL, dtype=torch.int64, device=runtime.device)
        self.accepted: list[tuple[int, torch.Tensor]] = []
        self.state = {"largest_total_weight": torch.tensor(largest_total_weight)}
        """W, and what rounds leave to the next ones; a checkpoint keeps it. A round that moves it puts another
        in its place, so that it can be taken back."""

    def add(self, update: ClientUpdate) -> None:
        """Adds an update, or counts it as rejected; decided on the device, without waiting for it."""
        accepted = (update.delta.abs() < DELTA_LIMIT).all()
        weight = accepted.long() * self._weight(update)
        tail = self.total[-TAIL:]
        self.total[:-TAIL] += torch.where(accepted, self._quantized(update, accepted), 0) * weight
        loss = torch.nan_to_num(update.loss, nan=DELTA_LIMIT).clamp(-DELTA_LIMIT, DELTA_LIMIT)
        tail[_WEIGHT] += weight
        tail[_REJECTED] += 1 - accepted.long()
        tail[_LOSS] += quantize(loss, self.loss_bits) * weight
        tail[_SAMPLES] += update.num_samples
        self.accepted.append((update.client, accepted))

    def rejected_clients(self) -> list[int]:
        """This rank's clients that were rejected."""
        if not self.accepted:
            return []
        flags = torch.stack([accepted for _, accepted in self.accepted]).tolist()
        return [client for (client, _), accepted in zip(self.accepted, flags) if not accepted]

    def reduce(self, round_number: int, stop_requested: bool = False, is_dropped: bool = False) -> RoundTotal:
        """Sums over ranks and starts over; every rank must call it once a round."""
        if self.runtime.is_main:
            self._add_noise(round_number)
        self.total[-TAIL + _STOP] = int(stop_requested)
        self.total[-TAIL + _DROP] = int(is_dropped)
        total = sum_over_ranks(self.total, self.runtime)
        weight, rejected, loss, samples, _, stop, drop = total[-TAIL:].tolist()
        result = RoundTotal(
            mean_delta=self._mean(total[:-TAIL], weight),
            num_rejected=rejected,
            train_loss=loss / (weight * 2.0**self.loss_bits) if weight else None,
            num_samples=samples,
            stop_requested=stop > 0,
            is_dropped=drop > 0,
        )
        if not result.is_dropped:
            self._end_round(total[-TAIL:])
        self.total.zero_()
        self.accepted.clear()
        return result

    def figures(self) -> dict[str, float]:
        """What moves from round to round, for a log."""
        return {}

    @property
    def loss_bits(self) -> int:
        return fraction_bits(int(self.state["largest_total_weight"]))

    @property
    def bits(self) -> int:
        """s."""
        return self.loss_bits

    def _weight(self, update: ClientUpdate) -> int:
        return update.weight

    def _quantized(self, update: ClientUpdate, accepted: torch.Tensor) -> torch.Tensor:
        """What an update adds to the sum for each unit of its weight, in multiples of 2^-bits: int64 [P]."""
        return quantize(update.delta, self.bits)

    def _add_noise(self, round_number: int) -> None:
        """On rank 0, to its own sum."""

    def _mean(self, total: torch.Tensor, weight: int) -> torch.Tensor | None:
        return (total.double() / (weight * 2.0**self.bits)).float() if weight else None

    def _end_round(self, tail: torch.Tensor) -> None:
        """With the tail of the sum over ranks."""
