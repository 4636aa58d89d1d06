"""The privacy plan that a config asks for."""

import torch

from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.participation.plan import Participation
from fedpeft_dist.privacy.budget import PrivacyPlan
from fedpeft_dist.privacy.sample_plan import SamplePlan
from fedpeft_dist.privacy.user_plan import UserPlan

PLANS = {"sample": SamplePlan, "user": UserPlan}
"""The plan of each mechanism with a guarantee."""


def make_privacy_plan(
    config: RunConfig, participation: Participation, noise_multipliers: torch.Tensor | None = None
) -> PrivacyPlan | None:
    """The plan of a run; None if its privacy is not accounted for.

    Args:
        noise_multipliers: those that the run has begun with. They stay; a client that has none and takes part now gets
            one.

    Raises:
        ConfigError: no noise meets the target, the stored noise fails it, or the first round exceeds the budget.
    """
    make = PLANS.get(config.privacy.name)
    return None if make is None else make(config, participation, noise_multipliers)
