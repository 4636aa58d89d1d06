"""The course of a round: what each selected client does, and which updates count when the round ends.

The server sends the parameters to the clients that it selects. Each client receives them, trains, and sends its update.
The round ends when the server has all the updates that it wants, or at the deadline. All times are simulated seconds
since the start of the round.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal, NamedTuple

from fedpeft_dist.config.schema import ParticipationConfig


@dataclass(frozen=True)
class LocalWork:
    """The local training of one client in one round."""

    num_samples: int
    """Samples of a local epoch. Its last batch may be short."""
    batch_size: int
    num_steps: int
    """Local steps that the client takes if nothing stops it."""

    @property
    def batches(self) -> int:
        """Batches of a local epoch."""
        return -(-self.num_samples // self.batch_size)

    def samples(self, steps: int) -> int:
        """The number of samples that the first steps use. A sample counts once for each use."""
        epochs, batches = divmod(steps, max(self.batches, 1))
        return epochs * self.num_samples + batches * self.batch_size

    def steps_within(self, seconds: float, samples_per_second: float) -> int:
        """The number of steps that end within a time; 0 if the time is negative."""
        seconds = max(seconds, 0.0)
        if self.samples(self.num_steps) / samples_per_second <= seconds:
            return self.num_steps
        epochs, rest = divmod(seconds * samples_per_second, self.num_samples)
        batches = int(rest // self.batch_size)
        # The last, short batch of an epoch ends only when the epoch ends.
        return min(int(epochs) * self.batches + min(batches, self.batches - 1), self.num_steps)


@dataclass(frozen=True)
class RoundPlan:
    """The clients that count in one round, and what happens to the other selected clients."""

    steps: dict[int, int]
    """Local steps of each client whose update counts, by client, ascending."""
    selected: int
    """Number of clients that receive the parameters."""
    dropped: int
    """Number of selected clients that are lost before, during or after local training."""
    late: int
    """Number of selected clients that cannot meet the deadline."""
    surplus: int
    """Number of clients that report after the cohort is complete."""
    partial: int
    """Number of clients that count with fewer local steps than they would take without a deadline."""
    wasted_samples: int
    """Training samples that clients use for updates that do not count."""
    seconds: float | None
    """Simulated duration of the round; None if clients take no simulated time."""

    @property
    def cohort(self) -> int:
        """Number of clients whose updates count."""
        return len(self.steps)

    def figures(self) -> dict[str, float]:
        """The round's numbers for the log, without its cohort."""
        counts = ("selected", "dropped", "late", "surplus", "partial", "wasted_samples")
        times = {} if self.seconds is None else {"simulated_seconds": self.seconds}
        return {name: getattr(self, name) for name in counts} | times


class Course(NamedTuple):
    """The course of one selected client, unless the round ends first."""

    client: int
    work: LocalWork
    samples_per_second: float
    received: float
    """Time at which the client starts to train."""
    steps: int
    """Local steps that the client takes."""
    ends: float
    """Time at which the client reports, is lost, or meets the deadline."""
    outcome: Literal["reports", "lost", "late"]

    def samples_until(self, end: float) -> int:
        """Samples that the client has trained on at a time."""
        done = self.work.steps_within(end - self.received, self.samples_per_second)
        return self.work.samples(min(self.steps, done))


def plan_round(courses: Sequence[Course], wanted: int, config: ParticipationConfig) -> RoundPlan:
    """The plan that follows from all courses of a round.

    Args:
        courses: one for each selected client, in the order drawn.
        wanted: number of updates that complete the cohort.
    """
    # Sorting is stable: clients that report at the same time stay in the order drawn.
    reports = sorted((course for course in courses if course.outcome == "reports"), key=attrgetter("ends"))
    counted = reports[:wanted]
    # Without a deadline the server waits until its cohort is complete, or every client has reported or is lost.
    if len(counted) == wanted or config.deadline is None:
        end = max((course.ends for course in (counted if len(counted) == wanted else courses)), default=0.0)
    else:
        end = config.deadline
    steps = {course.client: course.steps for course in sorted(counted, key=attrgetter("client"))}
    outcomes = Counter(course.outcome for course in courses)
    return RoundPlan(
        steps=steps,
        selected=len(courses),
        dropped=outcomes["lost"],
        late=outcomes["late"],
        surplus=len(reports) - len(counted),
        partial=sum(course.steps < course.work.num_steps for course in counted),
        wasted_samples=sum(course.samples_until(end) for course in courses if course.client not in steps),
        seconds=None if config.devices.name == "none" else end,
    )
