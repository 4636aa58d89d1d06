"""A client's local training in numbers: the samples that its first steps go through, the steps that fit in a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class LocalWork:
    num_samples: int
    """Of an epoch."""
    batch_size: int
    """The last batch of an epoch may be short."""
    num_steps: int
    """All that it would take in a round."""

    @cached_property
    def batches(self) -> int:
        """Of an epoch."""
        return -(-self.num_samples // self.batch_size)

    def samples(self, steps: int) -> int:
        """That the first steps go through, repetitions counted."""
        if not steps:
            return 0
        epochs, batches = divmod(steps, self.batches)
        return epochs * self.num_samples + batches * self.batch_size

    def steps_within(self, seconds: float, samples_per_second: float) -> int:
        """The steps that are done after so many seconds; none after less than 0."""
        if seconds < 0:
            return 0
        if self.samples(self.num_steps) / samples_per_second <= seconds:
            return self.num_steps
        samples = seconds * samples_per_second
        epochs = int(samples // self.num_samples)
        batches = int((samples - epochs * self.num_samples) // self.batch_size)
        # An epoch's last, short batch is done only with the epoch.
        return min(epochs * self.batches + min(batches, self.batches - 1), self.num_steps)
