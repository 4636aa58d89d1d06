"""Who takes part in a round, and what becomes of them: selected, lost, late, or counted, and in what simulated time.

A round of the simulated server: it sends the parameters to the clients that it selects, each receives them, trains and
sends its update; the round ends as soon as as many updates as it wants are there, or at the deadline. All that is known
before anything is trained, for it follows from the config, the seed and the number of the round: every rank plans the
same, nothing is sent or kept, and clients whose update would not count are not trained.

A client without samples is never selected: the population that cohorts are drawn from is the clients that have some.

Shapes: N clients, H clients that have samples, M cohort, P trainable parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.data.partition import Partition
from fedpeft_dist.lanes.wire import BYTES_PER_PARAMETER
from fedpeft_dist.participation.availability import KEY as TRACE_KEY
from fedpeft_dist.participation.availability import make_availability
from fedpeft_dist.participation.devices import make_devices
from fedpeft_dist.participation.dropout import STAYS, make_dropout
from fedpeft_dist.participation.local_work import LocalWork
from fedpeft_dist.participation.sampling import WeightedOrder, first, poisson_draw, uniform_order
from fedpeft_dist.participation.traces import digest

_CHUNK = 2**20
"""Clients that are asked at once whether they are available."""


@dataclass(frozen=True)
class RoundPlan:
    steps: dict[int, int]
    """The clients whose updates count, ascending, and the local steps of each."""
    selected: int
    """Clients that receive the parameters."""
    dropped: int
    """Of these: lost before, during or after local training."""
    late: int
    """Could not meet the deadline."""
    surplus: int
    """Selected beyond the cohort, and not among the first."""
    partial: int
    """Of those that count: with fewer local steps than they would have taken without a deadline."""
    wasted_samples: int
    """Training samples that simulated clients went through for updates that do not count."""
    seconds: float | None
    """Simulated, from the server's sending to the last update that it waits for, or to the deadline; None
    where clients take no simulated time."""

    @property
    def cohort(self) -> int:
        return len(self.steps)

    def figures(self) -> dict[str, float]:
        """What a log says of the round, beside its cohort."""
        counts = ("selected", "dropped", "late", "surplus", "partial", "wasted_samples")
        figures = {name: getattr(self, name) for name in counts}
        return figures if self.seconds is None else {**figures, "simulated_seconds": self.seconds}


class _Course(NamedTuple):
    """How a round goes for one selected client, were it not ended before."""

    client: int
    work: LocalWork
    speed: float
    """Samples per second."""
    received: float
    """When its training begins, in simulated seconds."""
    steps: int
    """Local steps that it takes, reported or not."""
    moment: float
    """When it reports or is lost."""
    reports: bool
    is_lost: bool = False

    def samples_until(self, end: float) -> int:
        """That it has trained on when the round ends."""
        return self.work.samples(min(self.steps, self.work.steps_within(end - self.received, self.speed)))


class Participation:
    """
    Args:
        num_parameters: P, which each client receives and sends.

    Raises:
        ConfigError: a trace that cannot be read or does not fit the population.
    """

    def __init__(self, config: RunConfig, partition: Partition, num_parameters: int):
        federation, self.client_config = config.federation, config.client
        self.config, self.cohort, self.seed = federation.participation, federation.cohort, config.seed
        self._cohort_seed = config.seed
        self.partition, self.holders = partition, partition.holders()
        """Every client's samples, and the clients that have some: int64 [H], None where all have."""
        self.population = partition.num_clients if self.holders is None else len(self.holders)
        """H."""
        self.bytes = num_parameters * BYTES_PER_PARAMETER
        self._work = cache(self._work_of)
        self.available = cache(self.available)  # costs O(N) a round, and is asked for again
        self.is_user_level, self.is_sample_level = config.privacy.name == "user", config.privacy.name == "sample"
        self.availability = make_availability(self.config, partition.num_clients, self.seed, self.holders)
        self.dropout = make_dropout(self.config.dropout, partition.num_clients, self.seed)
        self.devices = make_devices(self.config.devices, partition.num_clients, self.seed)
        self.deadline = math.inf if self.config.deadline is None else self.config.deadline
        self.weighted = WeightedOrder(partition.sizes()) if self.config.name == "weighted" else None
        sections = (self.config.availability, self.config.dropout, self.config.devices)
        self.sha256 = digest([section.path for section in sections if section.name == "trace"])
        """Of the traces' content; the empty text where there are none."""

    @property
    def num_selected(self) -> int:
        """How many clients the server selects where enough are available; not under poisson."""
        return math.ceil(round(self.config.over_selection * self.cohort, 9))  # 1.1 * 10 is a little above 11

    @property
    def largest_weight(self) -> int:
        """W, which bounds the sum of a round's weights."""
        return self.partition.largest_total(self.population if self.config.name == "poisson" else self.cohort)

    def check(self) -> None:
        """
        Raises:
            ConfigError: more clients are wanted than there can be, or nobody can meet the deadline; costs O(N).
        """
        cohort, wanted = f"federation.cohort: {self.cohort}", self.num_selected
        if self.cohort > self.population:
            raise ConfigError(
                f"{cohort} is larger than the {self.population} clients that have samples, of "
                f"{self.partition.num_clients}, and others are never selected; give at most {self.population}"
            )
        if wanted > self.population:
            raise ConfigError(
                f"federation.participation.over_selection: {self.config.over_selection} selects {wanted} clients of a "
                f"population of {self.population}; give at most {self.population / self.cohort:.6g}"
            )
        if self.availability is not None and self.cohort > self.availability.most:
            raise ConfigError(
                f"{cohort} is larger than the {self.availability.most} clients that are ever available at once, by "
                f"{TRACE_KEY}: '{self.config.availability.path}'; give at most {self.availability.most}"
            )
        if self.config.deadline is not None:
            self._check_deadline(self.config.deadline)

    def _check_deadline(self, deadline: float) -> None:
        partial, devices = self.config.late == "partial", self.devices
        sizes, places = np.unique(self.partition.sizes(), return_inverse=True)  # few differ, of however many clients
        works = [self._work(int(size)) for size in sizes]
        samples = np.array([work.samples(min(work.num_steps, 1 if partial else work.num_steps)) for work in works])
        seconds = self.bytes / devices.downlink_bytes_per_second + self.bytes / devices.uplink_bytes_per_second
        seconds += samples[places] / devices.samples_per_second
        seconds[sizes[places] == 0] = math.inf  # nobody is helped by a client that has nothing to train on
        if seconds.min() > deadline:
            what = "a single local step" if partial else "all its local steps"
            raise ConfigError(
                f"federation.participation.deadline: {deadline:g} seconds are met by no client: the fastest needs "
                f"{seconds.min():.4g} to receive {self.bytes:,} bytes, take {what} and send as many; give more"
            )

    def describe(self) -> str | None:
        """A line on how many clients there are to choose from; None where all are."""
        told, everyone = [], f"{self.population:,} clients"
        if self.holders is not None:
            without = self.partition.num_clients - self.population
            told.append(f"{without:,} of {self.partition.num_clients:,} clients have no samples and are never selected")
            everyone = f"the other {self.population:,}"
        if self.availability is not None:
            told.append(f"{self.availability.share * self.population:,.4g} of {everyone} are available on average")
        return "; ".join(told) or None

    def draw_cohorts_from(self, secret: int) -> None:
        """From now on cohorts do not follow from the config's seed, which others may know and other runs may have."""
        self._cohort_seed = secret

    def available(self, round_number: int) -> int:
        """How many clients that have samples could be reached in a round, counted from 0; costs O(N) where not all of
        them can."""
        if self.availability is None:
            return self.population
        starts = range(0, self.population, _CHUNK)
        chunks = (np.arange(start, min(start + _CHUNK, self.population)) for start in starts)
        return sum(int(np.count_nonzero(self.availability.of(self._at(chunk), round_number))) for chunk in chunks)

    def _at(self, places: np.ndarray) -> np.ndarray:
        """The clients at these places of the population: int64."""
        return places if self.holders is None else self.holders[places]

    def sampling_probability(self, round_number: int) -> float:
        """With which poisson draws each available client. Under user-level privacy, whose noise is that of `cohort`
        clients, so many are expected however few are available; else fewer are."""
        clients = self.available(round_number) if self.is_user_level else self.population
        return min(1.0, self.cohort / clients) if clients else 0.0

    def select(self, round_number: int) -> np.ndarray:
        """The clients that the server sends the parameters to in a round, counted from 0, in the order drawn: int64."""

        def available(clients: np.ndarray) -> np.ndarray:
            return clients if self.availability is None else clients[self.availability.of(clients, round_number)]

        def available_at(places: np.ndarray) -> np.ndarray:
            return available(self._at(places))

        where, wanted = (self._cohort_seed, round_number), min(self.num_selected, self.population)
        match self.config.name:
            case "poisson":
                return poisson_draw(self.population, self.sampling_probability(round_number), *where, available_at)
            case "weighted":
                return first(self.weighted(wanted, *where, available), wanted)
        return first(uniform_order(self.population, wanted, *where, available_at), wanted)

    def plan(self, round_number: int) -> RoundPlan:
        """What becomes of a round, counted from 0: a function of config, seed and round alone."""
        selected = self.select(round_number)
        progress = self.dropout.progress(selected, round_number)
        speeds = self.devices.of(selected)
        courses = [self._course(*row) for row in zip(selected.tolist(), progress.tolist(), *speeds)]
        # Sorting keeps the order drawn among those that report at once, as all do where nothing takes time.
        reports = sorted((course for course in courses if course.reports), key=lambda course: course.moment)
        wanted = len(selected) if self.config.name == "poisson" else min(self.cohort, len(selected))
        counted, surplus = reports[:wanted], len(reports[wanted:])
        end = self._end(counted, courses, is_full=len(counted) == wanted)
        ids = {course.client for course in counted}
        return RoundPlan(
            steps={course.client: course.steps for course in sorted(counted, key=lambda course: course.client)},
            selected=len(selected),
            dropped=sum(course.is_lost for course in courses),
            late=sum(not course.reports and not course.is_lost for course in courses),
            surplus=surplus,
            partial=sum(course.steps < course.work.num_steps for course in counted),
            wasted_samples=sum(course.samples_until(end) for course in courses if course.client not in ids),
            seconds=None if self.config.devices.name == "none" else end,
        )

    def _end(self, counted: Sequence[_Course], courses: Sequence[_Course], is_full: bool) -> float:
        """When the round ends. A server without a deadline waits until it has lost or heard of everyone."""
        if is_full:
            return max((course.moment for course in counted), default=0.0)
        if math.isfinite(self.deadline):
            return self.deadline
        return max(course.moment for course in courses)

    def _course(self, client: int, lost_after: float, speed: float, uplink: float, downlink: float) -> _Course:
        """
        Args:
            lost_after: the share of its local steps after which it is lost, or STAYS.
            speed: samples per second.
            uplink: bytes per second, as downlink.
        """
        work = self._work(self.partition.size(client))
        received, sending = self.bytes / downlink, self.bytes / uplink
        if lost_after != STAYS:
            steps = int(lost_after * work.num_steps)
            moment = received + work.samples(steps) / speed
            return _Course(client, work, speed, received, steps, moment, reports=False, is_lost=True)
        left = self.deadline - received - sending
        steps = work.steps_within(left, speed)
        if left >= 0 and (steps == work.num_steps or (steps and self.config.late == "partial")):
            moment = min(received + work.samples(steps) / speed + sending, self.deadline)
            return _Course(client, work, speed, received, steps, moment, reports=True)
        return _Course(client, work, speed, received, work.num_steps, self.deadline, reports=False)

    def _work_of(self, num_samples: int) -> LocalWork:
        batch_size, num_steps = self.client_config.batch_size, self.client_config.num_steps(num_samples)
        if self.is_sample_level and num_samples:  # every step draws its batch, of one size on average
            batch_size = min(batch_size, num_samples)
            num_samples = batch_size * -(-num_samples // batch_size)
        return LocalWork(num_samples, batch_size, num_steps)
