"""The privacy plan of a config that is not run: without weights, and with as little data as it takes."""

from __future__ import annotations

from fedpeft_dist.config.schema import AccountedPrivacy, RunConfig
from fedpeft_dist.data import load_dataset
from fedpeft_dist.data.partition import Partition, SharedPoolPartition
from fedpeft_dist.federation.participation import Participation
from fedpeft_dist.federation.privacy_plan import PrivacyPlan, make_privacy_plan
from fedpeft_dist.federation.simulation import make_clients
from fedpeft_dist.lanes.random import derive_seed
from fedpeft_dist.tracking.cost import compute_cost


def plan_ahead(config: RunConfig) -> PrivacyPlan | None:
    """The plan that a run would have; None where nothing is accounted for.

    Raises:
        ConfigError: as `make_privacy_plan`; data that cannot be read, a cohort or a deadline that cannot be.
    """
    if not isinstance(config.privacy, AccountedPrivacy):
        return None
    takes_time = config.federation.participation.devices.name != "none"
    num_parameters = compute_cost(config).trainable_parameters if takes_time else 0
    participation = Participation(config, _partition(config), num_parameters)
    if config.privacy.name == "sample":  # else nothing depends on who is late, nor are the clients' sizes known here
        participation.check()
    return make_privacy_plan(config, participation)


def _partition(config: RunConfig) -> Partition:
    if config.privacy.name == "user" and config.data.clients is not None:
        return SharedPoolPartition(config.data.clients, samples_per_client=config.client.batch_size, pool=1)
    dataset = load_dataset(config.data, derive_seed(config.seed, "data"))
    return make_clients(config, dataset.train)[0]
