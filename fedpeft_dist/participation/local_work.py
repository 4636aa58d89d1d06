"""A client's local training in numbers: the samples that its first steps use, and the steps that fit in a time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LocalWork:
    """The local training of one client in one round."""

    num_samples: int
    """Samples of a local epoch."""
    batch_size: int
    """Samples of a batch. The last batch of a local epoch may be short."""
    num_steps: int
    """Local steps that the client takes if nothing stops it."""

    @property
    def batches(self) -> int:
        """Batches of a local epoch."""
        return -(-self.num_samples // self.batch_size)

    def samples(self, steps: int) -> int:
        """The number of samples that the first steps use. A sample counts once for each use."""
        if not steps:
            return 0
        epochs, batches = divmod(steps, self.batches)
        return epochs * self.num_samples + batches * self.batch_size

    def steps_within(self, seconds: float, samples_per_second: float) -> int:
        """The number of steps that end within a time; 0 if the time is negative."""
        if seconds < 0:
            return 0
        if self.samples(self.num_steps) / samples_per_second <= seconds:
            return self.num_steps
        samples = seconds * samples_per_second
        epochs = int(samples // self.num_samples)
        batches = int((samples - epochs * self.num_samples) // self.batch_size)
        # The last, short batch of an epoch ends only when the epoch ends.
        return min(epochs * self.batches + min(batches, self.batches - 1), self.num_steps)
