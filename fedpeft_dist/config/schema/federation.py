"""The `federation` section: rounds, cohort and evaluation; who takes part in a round, and who is lost or late."""

from typing import Annotated, Literal

from pydantic import Field

from fedpeft_dist.config.paths import UserPath
from fedpeft_dist.config.schema.types import Count, Fraction, Positive, Probability, Section, Share


class AlwaysAvailable(Section):
    name: Literal["always"]


class OnOffAvailability(Section):
    """Each client goes on and off at random, independently of the others."""

    name: Literal["on_off"]
    share: Share = 0.5
    """Share of the rounds in which a client is available."""
    spread: Fraction = 0.0
    """Difference between clients: the share of each is drawn uniformly from share - spread to share + spread."""
    rounds: Count = 1
    """Rounds for which a client stays on or off before the next draw. Clients are drawn at different rounds."""

    def problems(self) -> dict[str, bool]:
        room = min(self.share, 1.0 - self.share)
        message = f"share {self.share} with spread {self.spread} leaves 0 to 1; give a spread of {room:.6g}"
        return {message: self.spread > room}


class DiurnalAvailability(Section):
    """The probability that a client is available follows its time of day, as a cosine between `low` and `high`."""

    name: Literal["diurnal"]
    low: Probability = 0.1
    high: Share = 0.9
    period: Positive = 86_400.0
    """Seconds of a day. Round r starts r * `seconds_per_round` seconds after the start of the first day."""
    spread: Probability = 1.0
    """Share of a day over which the clients' days begin: 0 is one time zone, 1 is the whole world."""

    def problems(self) -> dict[str, bool]:
        return {f"low: {self.low} is above high: {self.high}; give the smaller as low": self.low > self.high}


class TraceAvailability(Section):
    """Availability from a CSV file with the columns `client,start,end,available`, in any order of rows.

    A row says whether a client (counted from 0) is available (1) or not (0) from second `start` up to, but without,
    second `end`. The rows of a client follow each other without gap or overlap, from 0 to an end that all clients
    share. After the end the trace begins again. Round r looks at second r * `seconds_per_round`.
    """

    name: Literal["trace"]
    path: UserPath


AvailabilityConfig = Annotated[
    AlwaysAvailable | OnOffAvailability | DiurnalAvailability | TraceAvailability, Field(discriminator="name")
]


class NoDropout(Section):
    name: Literal["none"]


class RandomDropout(Section):
    """In every round each selected client is lost at most once, with these probabilities."""

    name: Literal["random"]
    before: Probability = 0.0
    """Probability that a client receives the parameters and then trains nothing."""
    during: Probability = 0.0
    """Probability that a client trains a random share of its local steps and sends nothing."""
    after: Probability = 0.0
    """Probability that a client trains, but its update does not arrive."""

    def problems(self) -> dict[str, bool]:
        total = self.before + self.during + self.after
        message = f"before, during and after add up to {total:.6g}; give probabilities of at most 1 together"
        return {message: total > 1.0 + 1e-9}


class TraceDropout(Section):
    """Dropout from a CSV file with the columns `round,client,when`, where `when` is before, during or after.

    A row says that a client (counted from 0) is lost if it is selected in that round (counted from 1, as in
    metrics.jsonl). `when` means the same as in `RandomDropout`. A client without a row is not lost.
    """

    name: Literal["trace"]
    path: UserPath


DropoutConfig = Annotated[NoDropout | RandomDropout | TraceDropout, Field(discriminator="name")]


class NoDevices(Section):
    """Clients take no simulated time."""

    name: Literal["none"]


class LognormalDevices(Section):
    """Each client has its own speed and link for the whole run: a median times exp(sigma * normal)."""

    name: Literal["lognormal"]
    samples_per_second: Positive = 100.0
    """Local training speed of the median client."""
    uplink_bytes_per_second: Positive = 1.0e6
    downlink_bytes_per_second: Positive = 4.0e6
    compute_sigma: Annotated[float, Field(ge=0.0, le=10.0)] = 1.0
    bandwidth_sigma: Annotated[float, Field(ge=0.0, le=10.0)] = 1.0
    """Sigma of the link. A client with a slow link is slow both ways."""


class TraceDevices(Section):
    """Speeds from a CSV file with one row for each client (counted from 0), in any order. All speeds are above 0.

    The columns are `client,samples_per_second,uplink_bytes_per_second,downlink_bytes_per_second`.
    """

    name: Literal["trace"]
    path: UserPath


DevicesConfig = Annotated[NoDevices | LognormalDevices | TraceDevices, Field(discriminator="name")]


class ParticipationConfig(Section):
    """The clients that take part in a round, are lost or are late. Paths are relative to the command's folder."""

    name: Literal["uniform", "poisson", "weighted"] = "uniform"
    """How cohorts are drawn.

    uniform: `cohort` of the available clients. poisson: each available client independently, with probability
    cohort / N (under user-level privacy, cohort / the number of available clients). weighted: `cohort` of the available
    clients, one after another, in proportion to their samples. A client's weight in the mean of updates is its number
    of samples, for all three. N counts the clients that have samples; only these are selected."""
    over_selection: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] = 1.0
    """Number of selected clients divided by `cohort`. The first `cohort` clients to report count. Not for poisson."""
    availability: AvailabilityConfig = AlwaysAvailable(name="always")
    seconds_per_round: Positive = 3600.0
    """Seconds between the starts of two rounds, for `availability`. The first round starts at second 0."""
    dropout: DropoutConfig = NoDropout(name="none")
    devices: DevicesConfig = NoDevices(name="none")
    """How fast clients receive, train and send. A round's simulated seconds follow from these speeds."""
    deadline: Positive | None = None
    """Simulated seconds after which a round ends, even if clients still work; null waits for all."""
    late: Literal["drop", "partial"] = "drop"
    """What happens to a client that cannot meet the deadline. drop: it does not count. partial: it takes only the local
    steps that fit, and its update counts with its usual weight; if no step fits, it is dropped."""

    @property
    def is_ideal(self) -> bool:
        """Whether all clients are available, none is lost, and nothing takes simulated time."""
        names = (self.availability.name, self.dropout.name, self.devices.name)
        return names == ("always", "none", "none") and self.over_selection == 1.0

    def problems(self) -> dict[str, bool]:
        has_deadline = self.deadline is not None
        return {
            f"over_selection: {self.over_selection} does not go with poisson, whose cohorts vary; give 1.0": (
                self.name == "poisson" and self.over_selection != 1.0
            ),
            f"deadline: {self.deadline} needs devices, which say how long a client takes; give devices: "
            "{name: lognormal} or {name: trace}, or deadline: null": has_deadline and self.devices.name == "none",
            "late: partial needs a deadline, and deadline: null has none to miss; give one": (
                self.late == "partial" and not has_deadline
            ),
        }


class FederationConfig(Section):
    rounds: Count = 50
    cohort: Count = 8
    """M, the number of clients that take part in a round; under poisson the expected number."""
    evaluate_every: Annotated[int, Field(ge=0)] = 1
    """Rounds between two evaluations; 0 evaluates at the end only."""
    evaluate_on: Literal["test", "validation"] = "test"
    evaluate_clients: bool = False
    """Also report the mean and the 10th percentile of the clients' own accuracies (needs `data.validation`)."""
    participation: ParticipationConfig = ParticipationConfig()
