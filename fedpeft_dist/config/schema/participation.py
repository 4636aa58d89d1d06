"""The `federation.participation` section: who takes part in a round, and what becomes of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedpeft_dist.config.paths import UserPath
from fedpeft_dist.config.schema.types import Count, Fraction, Positive, Probability, Section, Share


class AlwaysAvailable(Section):
    name: Literal["always"]


class OnOffAvailability(Section):
    """Every client goes on and off by itself, at random."""

    name: Literal["on_off"]
    share: Share = 0.5
    """Of the rounds, in which a client is available."""
    spread: Fraction = 0.0
    """Clients differ: each has a share of its own, uniform between share - spread and share + spread."""
    rounds: Count = 1
    """How long a client stays as it is before it is drawn anew; each is drawn at other rounds."""

    @model_validator(mode="after")
    def _shares_are_probabilities(self) -> OnOffAvailability:
        room = min(self.share, 1.0 - self.share)
        if self.spread > room:
            raise ValueError(f"share {self.share} with spread {self.spread} leaves 0 to 1; give a spread of {room:.6g}")
        return self


class DiurnalAvailability(Section):
    """The probability that a client is available follows its time of day, as a cosine between `low` and `high`."""

    name: Literal["diurnal"]
    low: Probability = 0.1
    high: Share = 0.9
    period: Positive = 86_400.0
    """Seconds of a day; round r starts r * `seconds_per_round` seconds into the first."""
    spread: Probability = 1.0
    """Of a day, over which the clients' days begin: 0 is one time zone, 1 is around the world."""

    @model_validator(mode="after")
    def _low_is_lower(self) -> DiurnalAvailability:
        if self.low > self.high:
            raise ValueError(f"low: {self.low} is above high: {self.high}; give the smaller as low")
        return self


class TraceAvailability(Section):
    """From a CSV file with the columns `client,start,end,available`, in any order of rows.

    A row says whether a client (counted from 0) is available (1) or not (0) from second `start` up to, but without,
    second `end`. The rows of a client follow each other without gap or overlap, from 0 to an end that all clients
    share; after it the trace begins again. Round r looks at second r * `seconds_per_round`.
    """

    name: Literal["trace"]
    path: UserPath


AvailabilityConfig = Annotated[
    AlwaysAvailable | OnOffAvailability | DiurnalAvailability | TraceAvailability, Field(discriminator="name")
]


class NoDropout(Section):
    name: Literal["none"]


class RandomDropout(Section):
    """In every round each selected client is lost with these probabilities, at most one of them."""

    name: Literal["random"]
    before: Probability = 0.0
    """It has received the parameters, and trains nothing."""
    during: Probability = 0.0
    """It trains a share of its local steps, which is drawn, too, and sends nothing."""
    after: Probability = 0.0
    """It trains in vain: what it would send does not arrive."""

    @model_validator(mode="after")
    def _add_up(self) -> RandomDropout:
        total = self.before + self.during + self.after
        if total > 1.0 + 1e-9:
            raise ValueError(
                f"before, during and after add up to {total:.6g}; give probabilities of at most 1 together"
            )
        return self


class TraceDropout(Section):
    """From a CSV file with the columns `round,client,when`, where `when` is before, during or after.

    A row says that a client (counted from 0), should it be selected in that round (counted from 1, as in
    metrics.jsonl), is lost then; the meaning is that of `RandomDropout`. Whoever stands in no row stays.
    """

    name: Literal["trace"]
    path: UserPath


DropoutConfig = Annotated[NoDropout | RandomDropout | TraceDropout, Field(discriminator="name")]


class NoDevices(Section):
    """Clients take no simulated time."""

    name: Literal["none"]


class LognormalDevices(Section):
    """Each client has a speed and a link of its own for the whole run: a median times exp(sigma * normal)."""

    name: Literal["lognormal"]
    samples_per_second: Positive = 100.0
    """The median client's, in local training."""
    uplink_bytes_per_second: Positive = 1.0e6
    downlink_bytes_per_second: Positive = 4.0e6
    compute_sigma: Annotated[float, Field(ge=0.0, le=10.0)] = 1.0
    bandwidth_sigma: Annotated[float, Field(ge=0.0, le=10.0)] = 1.0
    """Of the link; a client with a slow one is slow both ways."""


class TraceDevices(Section):
    """From a CSV file with the columns `client,samples_per_second,uplink_bytes_per_second,downlink_bytes_per_second`.

    It has one row for each client (counted from 0), in any order; all speeds are above 0.
    """

    name: Literal["trace"]
    path: UserPath


DevicesConfig = Annotated[NoDevices | LognormalDevices | TraceDevices, Field(discriminator="name")]


class ParticipationConfig(Section):
    """Who takes part in a round, and what becomes of them. Paths are relative to the folder the command runs in."""

    name: Literal["uniform", "poisson", "weighted"] = "uniform"
    """uniform: `cohort` of the available clients; poisson: each of them by itself, with probability cohort / N
    (under user-level privacy, cohort over the number available);
    weighted: `cohort` of them, drawn one after another in proportion to their samples. In the mean of updates a client
    weighs as many as it has samples, whichever way it was drawn. N counts the clients that have samples: no others
    are selected."""
    over_selection: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] = 1.0
    """So many times `cohort` clients are selected, and the first `cohort` to report count; not for poisson."""
    availability: AvailabilityConfig = AlwaysAvailable(name="always")
    seconds_per_round: Positive = 3600.0
    """The clock of `availability`: round r, counted from 0, starts after r times as many seconds."""
    dropout: DropoutConfig = NoDropout(name="none")
    devices: DevicesConfig = NoDevices(name="none")
    """How fast clients receive, train and send: what a round's simulated seconds follow from."""
    deadline: Positive | None = None
    """Simulated seconds after which a round ends, whoever is still at work; null waits for all."""
    late: Literal["drop", "partial"] = "drop"
    """A client that cannot meet the deadline. drop: it does not count; partial: it sends what it has after those local
    steps that leave time for it, which counts with its usual weight; without time for a single step it is dropped."""

    @property
    def is_ideal(self) -> bool:
        """Whether everyone is there, nobody is lost, and nothing takes simulated time."""
        names = (self.availability.name, self.dropout.name, self.devices.name)
        return names == ("always", "none", "none") and self.over_selection == 1.0

    @model_validator(mode="after")
    def _fields_agree(self) -> ParticipationConfig:
        if self.name == "poisson" and self.over_selection != 1.0:
            raise ValueError(
                f"over_selection: {self.over_selection} does not go with poisson, whose cohorts vary; give 1.0"
            )
        if self.deadline is not None and self.devices.name == "none":
            raise ValueError(
                f"deadline: {self.deadline} needs devices, which say how long a client takes; "
                "give devices: {name: lognormal} or {name: trace}, or deadline: null"
            )
        if self.deadline is None and self.late == "partial":
            raise ValueError("late: partial needs a deadline, which nobody can miss where it is null; give one")
        return self
