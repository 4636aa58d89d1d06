"""Whether the round in work should end: a signal came, or a later attempt of the job has taken the run over."""

from fedpeft_dist.runtime.interrupts import StopRequest
from fedpeft_dist.tracking.run_lock import RunLock


class Watch:
    """
    Args:
        lock: the run's, held by rank 0; None on the others.
    """

    def __init__(self, stop: StopRequest, lock: RunLock | None = None):
        self.stop, self.lock = stop, lock

    def is_overdue(self) -> bool:
        """Whether to drop the round: the grace period after a request to stop is over."""
        if self.lock is not None:
            self.lock.look_around()
        return self.stop.is_overdue()

    def flags(self) -> tuple[bool, bool]:
        """Whether to stop after the round, and whether to drop the round."""
        is_lost = self.lock is not None and not self.lock.is_ours()
        return self.stop.received or is_lost, self.stop.is_overdue() or is_lost
