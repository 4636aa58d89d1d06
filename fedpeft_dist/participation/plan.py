"""Participation in a round: the clients that the server selects, and the clients whose updates count.

Everything is known before training, because it follows from the config, the seed and the round's number. Every rank
makes the same plan, so nothing is sent or kept. Clients whose updates would not count are not trained.

A client without samples is never selected: cohorts are drawn from the clients that have samples.

Shapes: N clients, H clients that have samples, M cohort.
"""

import math
from functools import cache

import numpy as np

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.data.partition import Partition
from fedpeft_dist.lanes.wire import Traffic
from fedpeft_dist.participation.conditions import STAYS, Devices, Dropout, make_availability, make_devices
from fedpeft_dist.participation.course import Course, LocalWork, RoundPlan, plan_round
from fedpeft_dist.participation.sampling import Draw, first, poisson_draw, uniform_order, weighted_order
from fedpeft_dist.participation.traces import digest

_CHUNK = 2**20
"""Number of clients that are asked at once whether they are available."""


class Participation:
    """The participation in every round of a run.

    Args:
        traffic: what a client sends and receives in a round.

    Raises:
        ConfigError: a trace cannot be read, or it does not fit the population.
    """

    def __init__(self, config: RunConfig, partition: Partition, traffic: Traffic):
        federation, self.client_config = config.federation, config.client
        self.config, self.cohort = federation.participation, federation.cohort
        self.privacy_name, self.traffic = config.privacy.name, traffic
        self.partition, self.holders = partition, partition.holders()
        """Every client's samples, and the clients that have some: int64 [H], or None if all have."""
        self.population = partition.num_clients if self.holders is None else len(self.holders)
        """H."""
        self.availability = make_availability(self.config, partition.num_clients, config.seed, self.holders)
        self.dropout = Dropout(self.config.dropout, partition.num_clients, config.seed)
        self.devices = make_devices(self.config.devices, partition.num_clients, config.seed)
        self._size_ends = np.cumsum(partition.sizes()) if self.config.name == "weighted" else None
        sections = (self.config.availability, self.config.dropout, self.config.devices)
        self.sha256 = digest(section.path for section in sections if section.name == "trace")
        """SHA-256 of the traces' content; the empty text if there are none."""
        self._cohort_seed = config.seed
        self._work = cache(self._local_work)
        self.available = cache(self._count_available)
        """Number of clients with samples that could be reached in a round, counted from 0."""

    @property
    def num_selected(self) -> int:
        """Number of clients that the server selects if enough are available. Poisson cohorts do not use this number."""
        return math.ceil(round(self.config.over_selection * self.cohort, 9))  # 1.1 * 10 is a little above 11

    @property
    def largest_weight(self) -> int:
        """W, the upper bound of the sum of a round's client weights."""
        return self.partition.largest_total(self.population if self.config.name == "poisson" else self.cohort)

    def check(self) -> None:
        """Checks that rounds are possible. Costs O(N).

        Raises:
            ConfigError: the config wants more clients than exist, or no client can meet the deadline.
        """
        cohort, population, config = self.cohort, self.population, self.config
        if cohort > population:
            raise ConfigError(
                f"federation.cohort: {cohort} is larger than the {population} clients that have samples, of "
                f"{self.partition.num_clients}, and others are never selected; give at most {population}"
            )
        if self.num_selected > population:
            raise ConfigError(
                f"federation.participation.over_selection: {config.over_selection} selects {self.num_selected} clients "
                f"of a population of {population}; give at most {population / cohort:.6g}"
            )
        if self.availability is not None and cohort > (most := self.availability.most):
            raise ConfigError(
                f"federation.cohort: {cohort} is larger than the {most} clients that are ever available at once, by "
                f"federation.participation.availability.path: '{config.availability.path}'; give at most {most}"
            )
        if config.deadline is None:
            return
        sizes, places = np.unique(self.partition.sizes(), return_inverse=True)  # many clients share few sizes
        works, partial = [self._work(int(size)) for size in sizes], config.late == "partial"
        samples = np.array([work.samples(min(work.num_steps, 1) if partial else work.num_steps) for work in works])
        seconds = sum(self._transfer_seconds(self.devices)) + samples[places] / self.devices.samples_per_second
        seconds[sizes[places] == 0] = math.inf  # a client without samples is never selected
        if seconds.min() > config.deadline:
            what, (uplink, downlink) = "a single local step" if partial else "all its local steps", self.traffic
            raise ConfigError(
                f"federation.participation.deadline: {config.deadline:g} seconds are met by no client: the fastest "
                f"needs {seconds.min():.4g} to receive {downlink:,} bytes, take {what} and send "
                f"{'as many' if uplink == downlink else f'{uplink:,}'}; give more"
            )

    def _transfer_seconds(self, speeds: Devices) -> tuple[np.ndarray | float, np.ndarray | float]:
        """The time to receive the parameters, and the time to send an update."""
        uplink, downlink = self.traffic
        return downlink / speeds.downlink_bytes_per_second, uplink / speeds.uplink_bytes_per_second

    def describe(self) -> str | None:
        """A line on how many clients a round can choose from; None if it can choose from all."""
        told, everyone = [], f"{self.population:,} clients"
        if self.holders is not None:
            without = self.partition.num_clients - self.population
            told.append(f"{without:,} of {self.partition.num_clients:,} clients have no samples and are never selected")
            everyone = f"the other {self.population:,}"
        if self.availability is not None:
            told.append(f"{self.availability.share * self.population:,.4g} of {everyone} are available on average")
        return "; ".join(told) or None

    def draw_cohorts_from(self, secret: int) -> None:
        """Draws all later cohorts from a secret seed, not from the config's, which others may know."""
        self._cohort_seed = secret

    def _count_available(self, round_number: int) -> int:
        """Costs O(N) if not all clients are always available."""
        if self.availability is None:
            return self.population
        starts = range(0, self.population, _CHUNK)
        chunks = (np.arange(start, min(start + _CHUNK, self.population)) for start in starts)
        return sum(int(np.count_nonzero(self.availability.of(self._at(chunk), round_number))) for chunk in chunks)

    def _at(self, places: np.ndarray) -> np.ndarray:
        """The clients at these places of the population: int64."""
        return places if self.holders is None else self.holders[places]

    def sampling_probability(self, round_number: int) -> float:
        """The probability with which poisson draws each available client.

        Under user-level privacy `cohort` clients are expected in every round, because the noise is scaled for them.
        Otherwise fewer are expected if fewer are available.
        """
        clients = self.available(round_number) if self.privacy_name == "user" else self.population
        return min(1.0, self.cohort / clients) if clients else 0.0

    def select(self, round_number: int) -> np.ndarray:
        """The clients that receive the parameters in a round, counted from 0, in the order drawn: int64."""

        def available(clients: np.ndarray) -> np.ndarray:
            return clients if self.availability is None else clients[self.availability.of(clients, round_number)]

        wanted = min(self.num_selected, self.population)
        if self.config.name == "weighted":
            draw = Draw(self._cohort_seed, round_number, available)
            return first(weighted_order(self._size_ends, wanted, draw), wanted)
        draw = Draw(self._cohort_seed, round_number, lambda places: available(self._at(places)))
        if self.config.name == "poisson":
            return poisson_draw(self.population, self.sampling_probability(round_number), draw)
        return first(uniform_order(self.population, wanted, draw), wanted)

    def plan(self, round_number: int) -> RoundPlan:
        """The plan of a round, counted from 0: a function of the config, the seed and the round alone."""
        selected = self.select(round_number)
        lost_after = self.dropout.progress(selected, round_number).tolist()
        courses = list(map(self._course, selected.tolist(), self.devices.of(selected), lost_after))
        wanted = len(courses) if self.config.name == "poisson" else min(self.cohort, len(courses))
        return plan_round(courses, wanted, self.config)

    def _course(self, client: int, speeds: Devices, lost_after: float) -> Course:
        """The course of a client that is lost after a share of its local steps, or STAYS."""
        work, speed = self._work(self.partition.size(client)), speeds.samples_per_second
        received, sending = self._transfer_seconds(speeds)
        deadline = math.inf if self.config.deadline is None else self.config.deadline
        left = deadline - received - sending
        steps = work.steps_within(left, speed)
        if lost_after != STAYS:
            steps, outcome = int(lost_after * work.num_steps), "lost"
            ends = received + work.samples(steps) / speed
        elif left >= 0 and (steps == work.num_steps or (steps and self.config.late == "partial")):
            outcome, ends = "reports", min(received + work.samples(steps) / speed + sending, deadline)
        else:
            steps, outcome, ends = work.num_steps, "late", deadline
        return Course(client, work, speed, received=received, steps=steps, ends=ends, outcome=outcome)

    def _local_work(self, num_samples: int) -> LocalWork:
        batch_size, num_steps = self.client_config.batch_size, self.client_config.num_steps(num_samples)
        if self.privacy_name == "sample" and num_samples:  # every step draws a batch of one expected size
            batch_size = min(batch_size, num_samples)
            num_samples = batch_size * -(-num_samples // batch_size)
        return LocalWork(num_samples, batch_size, num_steps)
