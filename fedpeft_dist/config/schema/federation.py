"""The `federation` section: rounds, cohort and evaluation."""

from typing import Annotated, Literal

from pydantic import Field

from fedpeft_dist.config.schema.participation import ParticipationConfig
from fedpeft_dist.config.schema.types import Count, Section


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
