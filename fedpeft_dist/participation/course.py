"""The course of a round: what each selected client does, and which updates count when the round ends.

The server sends the parameters to the clients that it selects. Each client receives them, trains, and sends its update.
The round ends when the server has all the updates that it wants, or at the deadline. All times are simulated seconds
since the start of the round.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fedpeft_dist.lanes.wire import Traffic
from fedpeft_dist.participation.devices import Devices
from fedpeft_dist.participation.dropout import STAYS


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
        figures = {name: getattr(self, name) for name in counts}
        return figures if self.seconds is None else {**figures, "simulated_seconds": self.seconds}


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


@dataclass(frozen=True)
class RoundRules:
    """The rules that all rounds of a run share."""

    traffic: Traffic
    """Bytes that a client receives, and bytes that it sends."""
    deadline: float | None
    """Time at which a round ends at the latest; None if the server waits for all clients."""
    keeps_partial: bool
    """Whether a client that cannot meet the deadline may report the local steps that fit."""
    takes_time: bool
    """Whether clients take simulated time."""

    def course(self, client: int, work: LocalWork, speeds: Devices, *, lost_after: float) -> Course:
        """The course of a client.

        Args:
            lost_after: share of its local steps after which the client is lost, or STAYS.
        """
        speed = speeds.samples_per_second
        received = self.traffic.downlink / speeds.downlink_bytes_per_second
        sending = self.traffic.uplink / speeds.uplink_bytes_per_second
        deadline = math.inf if self.deadline is None else self.deadline
        left = deadline - received - sending
        steps = work.steps_within(left, speed)
        if lost_after != STAYS:
            steps, outcome = int(lost_after * work.num_steps), "lost"
            ends = received + work.samples(steps) / speed
        elif left >= 0 and (steps == work.num_steps or (steps and self.keeps_partial)):
            outcome, ends = "reports", min(received + work.samples(steps) / speed + sending, deadline)
        else:
            steps, outcome, ends = work.num_steps, "late", deadline
        return Course(client, work, speed, received=received, steps=steps, ends=ends, outcome=outcome)

    def plan(self, courses: Sequence[Course], wanted: int) -> RoundPlan:
        """The plan that follows from all courses of a round.

        Args:
            courses: one for each selected client, in the order drawn.
            wanted: number of updates that complete the cohort.
        """
        # Sorting is stable: clients that report at the same time stay in the order drawn.
        reports = sorted((course for course in courses if course.outcome == "reports"), key=lambda course: course.ends)
        counted = reports[:wanted]
        end = self._end(counted, courses, is_full=len(counted) == wanted)
        ids = {course.client for course in counted}
        return RoundPlan(
            steps={course.client: course.steps for course in sorted(counted, key=lambda course: course.client)},
            selected=len(courses),
            dropped=sum(course.outcome == "lost" for course in courses),
            late=sum(course.outcome == "late" for course in courses),
            surplus=len(reports) - len(counted),
            partial=sum(course.steps < course.work.num_steps for course in counted),
            wasted_samples=sum(course.samples_until(end) for course in courses if course.client not in ids),
            seconds=end if self.takes_time else None,
        )

    def _end(self, counted: Sequence[Course], courses: Sequence[Course], is_full: bool) -> float:
        """When the round ends. Without a deadline the server waits until every client has reported or is lost."""
        if is_full:
            return max((course.ends for course in counted), default=0.0)
        return max(course.ends for course in courses) if self.deadline is None else self.deadline
