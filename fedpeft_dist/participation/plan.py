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
from fedpeft_dist.participation.availability import KEY as TRACE_KEY
from fedpeft_dist.participation.availability import make_availability
from fedpeft_dist.participation.course import LocalWork, RoundPlan, RoundRules
from fedpeft_dist.participation.devices import make_devices
from fedpeft_dist.participation.dropout import make_dropout
from fedpeft_dist.participation.sampling import Draw, WeightedOrder, first, poisson_draw, uniform_order
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
        self.is_user_level, self.is_sample_level = config.privacy.name == "user", config.privacy.name == "sample"
        self.partition, self.holders = partition, partition.holders()
        """Every client's samples, and the clients that have some: int64 [H], or None if all have."""
        self.population = partition.num_clients if self.holders is None else len(self.holders)
        """H."""
        self.availability = make_availability(self.config, partition.num_clients, config.seed, self.holders)
        self.dropout = make_dropout(self.config.dropout, partition.num_clients, config.seed)
        self.devices = make_devices(self.config.devices, partition.num_clients, config.seed)
        self.rules = RoundRules(
            traffic,
            self.config.deadline,
            keeps_partial=self.config.late == "partial",
            takes_time=self.config.devices.name != "none",
        )
        self._weighted = WeightedOrder(partition.sizes()) if self.config.name == "weighted" else None
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
        devices, traffic, partial = self.devices, self.rules.traffic, self.rules.keeps_partial
        sizes, places = np.unique(self.partition.sizes(), return_inverse=True)  # many clients share few sizes
        works = [self._work(int(size)) for size in sizes]
        samples = np.array([work.samples(min(work.num_steps, 1 if partial else work.num_steps)) for work in works])
        seconds = (
            traffic.downlink / devices.downlink_bytes_per_second + traffic.uplink / devices.uplink_bytes_per_second
        )
        seconds += samples[places] / devices.samples_per_second
        seconds[sizes[places] == 0] = math.inf  # a client without samples is never selected
        if seconds.min() > deadline:
            what = "a single local step" if partial else "all its local steps"
            sent = "as many" if traffic.uplink == traffic.downlink else f"{traffic.uplink:,}"
            raise ConfigError(
                f"federation.participation.deadline: {deadline:g} seconds are met by no client: the fastest needs "
                f"{seconds.min():.4g} to receive {traffic.downlink:,} bytes, take {what} and send {sent}; give more"
            )

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
        clients = self.available(round_number) if self.is_user_level else self.population
        return min(1.0, self.cohort / clients) if clients else 0.0

    def select(self, round_number: int) -> np.ndarray:
        """The clients that receive the parameters in a round, counted from 0, in the order drawn: int64."""

        def available(clients: np.ndarray) -> np.ndarray:
            return clients if self.availability is None else clients[self.availability.of(clients, round_number)]

        wanted = min(self.num_selected, self.population)
        if self._weighted is not None:
            return first(self._weighted(wanted, Draw(self._cohort_seed, round_number, available)), wanted)
        draw = Draw(self._cohort_seed, round_number, lambda places: available(self._at(places)))
        if self.config.name == "poisson":
            return poisson_draw(self.population, self.sampling_probability(round_number), draw)
        return first(uniform_order(self.population, wanted, draw), wanted)

    def plan(self, round_number: int) -> RoundPlan:
        """The plan of a round, counted from 0: a function of the config, the seed and the round alone."""
        selected = self.select(round_number)
        lost_after = self.dropout.progress(selected, round_number).tolist()
        courses = [
            self.rules.course(client, self._work(self.partition.size(client)), speeds, lost_after=share)
            for client, speeds, share in zip(selected.tolist(), self.devices.of(selected), lost_after)
        ]
        wanted = len(courses) if self.config.name == "poisson" else min(self.cohort, len(courses))
        return self.rules.plan(courses, wanted)

    def _local_work(self, num_samples: int) -> LocalWork:
        batch_size, num_steps = self.client_config.batch_size, self.client_config.num_steps(num_samples)
        if self.is_sample_level and num_samples:  # every step draws its batch, and all batches have one expected size
            batch_size = min(batch_size, num_samples)
            num_samples = batch_size * -(-num_samples // batch_size)
        return LocalWork(num_samples, batch_size, num_steps)
